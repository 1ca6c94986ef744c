"""The paper's side of a network: code lengths, sampling and interpolation of small pictures."""
