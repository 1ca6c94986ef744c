"""Relative-entropy coding of exactly Gaussian observations: DDPM's Algorithms 3 and 4.

Everything is in standardised units. Both ends hold the prior p = N(0, I); the encoder alone knows
mu and wants the decoder to hold a sample of q = N(mu, I): an observation of mu through unit noise.
That is worth KL(q || p) = |mu|^2 / 2 nats, and costs a little more:

1. *Chunks.* The coefficients are cut into chunks, about 11 bits of expected KL each.
2. *Selection.* Both ends can produce the same endless list of candidates z_1, z_2, ... ~ p, from
   a counter-based generator. The encoder picks one by the Poisson functional representation (Li and
   El Gamal 2018, "Strong functional representation lemma"; Maddison 2016): with arrival times
   t_1 < t_2 < ... of a unit Poisson process it is argmin_k t_k / w(z_k), w = q / p, and has
   law q exactly. Its index is what gets sent.
3. *Halving.* The search may only stop once t exceeds the best score times sup w, and
   w(z) = exp(mu.z - |mu|^2 / 2) is not bounded. Stopping anyway is a bias, and a large one: with
   2^16 candidates for 14 bits the noise's variance along mu is one half. So the encoder splits q
   itself: q = (1 - e) body + e tail, with body ~ min(w, c) p bounded by c, and tail ~ (w - c)+ p.
   It tosses an e-coin. Body: step 2, about c candidates. Tail: send "split" in place of an index,
   and write z = (z_1 + z_2) / sqrt(2), two observations of half the precision, which are standard
   normal and independent under p. First z_1 is simulated with weight E[w(z) | z_1], then z_2 with
   w(z) / E[w(z) | z_1], both by steps 2 and 3 again. A chunk whose KL is far above expectation
   (mu an outlier) takes the same way out: its pieces are N(mu / sqrt(2), I) twice.

So the law is exact for every mu (up to quadrature: 1e-4 in total variation), the mean work per
search is bounded by c, and an outlier costs bits in proportion to its KL. All weights depend on
z through its component along mu, which is the one-dimensional ``s`` below.

Floating point reaches the choice of an index (encoder alone) and the value of z (whose last
digits do not matter), never the entropy coder: indices are coded under integer tables that are
computed from integer expectations with exactly rounded arithmetic.

Further reading: Theis and Yosri 2022, "Algorithms for the communication of samples" (ordered random
coding, the biased relative of step 2); Flamich 2023, "Greedy Poisson rejection sampling" (needs no
bound on w, but its indices are 0.8 bit a chunk more expensive).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np
from constriction import stream
from numpy.typing import NDArray

from .errors import FormatError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Weight = Callable[[Floats], Floats]  # density ratio to N(0, 1) as a function of s; nondecreasing

BITS_PER_NAT = 1.4426950408889634  # 1 / ln 2
SPLIT = 0  # takes an index's place in the stream
STEPS = 8  # into which a level may be split, a power of two
OVERHEAD = 4.0  # bits that a chunk costs beyond its KL, about
EFFORT = 17  # log2 of the bound c: candidates looked at in one search, on average
RARE = 2.0**-10  # a bound that leaves less than this to the tail is high enough
MAX_NORM = 2000.0  # of mu over one chunk; beyond, the caller's model is broken
MAX_BITS = 32  # indices are below 2^32
MAX_DEPTH = 48  # of the halving; MAX_NORM needs 17, and each further one is improbable
BATCH = 1 << 17  # normals held in memory at a time during a search

SPAN = 1 << 16  # probabilities are multiples of 1 / SPAN

CLASSES = 64  # of expected KL, a quarter of a bit each
PIECES = ((0, 16), (16, 31))  # an index's bits below the leading one, as they are coded
CATEGORICAL = stream.model.Categorical(perfect=False)
UNIFORM = stream.model.Uniform()

CANDIDATES, PRIVATE = 0, 1  # streams of random numbers; the second is the encoder's own

GRID: Floats = np.arange(-8.0, 12.0, 1 / 64)  # quadrature over s; sqrt(2 KL) + 5 fits in
MASS: Floats = np.exp(-GRID * GRID / 2) / np.exp(-GRID * GRID / 2).sum()
INNER = slice(64, 1216, 4)  # a coarser rule on [-7, 11), for integrals at every grid point


def partition(kl_bits: Floats, target_bits: float) -> Ints:
    """Cut n coefficients into chunks of about ``target_bits`` of expected KL.

    kl_bits: (n,) expected KL of each, bits. Returns (n_chunks + 1,) boundaries, from 0 to n; no
    chunk is empty, and one coefficient is never cut. Integer arithmetic after one rounding, so
    that both ends find the same chunks from the same tables.
    """
    if len(kl_bits) == 0:
        return np.zeros(1, dtype=np.int64)
    total = np.cumsum(micro(kl_bits))
    target = max(1, round(target_bits * 2**20))
    n_chunks = max(1, (int(total[-1]) + target // 2) // target)
    # Chunk i ends with the coefficient in which the i-th of n_chunks equal shares ends.
    shares = [int(total[-1]) * i // n_chunks for i in range(1, n_chunks)]
    inner = np.searchsorted(total, np.array(shares, dtype=np.int64)) + 1
    return np.unique(np.concatenate([[0], inner, [len(kl_bits)]])).astype(np.int64)


@dataclass(frozen=True)
class Step:
    """One of the observations of which a level's consists."""

    precision: float
    before: float  # precision of those of the same level before it
    kl_bits: Floats  # (B,) expected KL of a coefficient of each band


def split(d: float, error: Floats, n: int, target_bits: float) -> list[Step]:
    """Make one observation of precision d out of up to STEPS, one after the other.

    error: (B,) E(x_0 - x0_hat)^2 of each band, n coefficients each. Before each step the
    expectation moves towards what the steps before have shown, see :func:`moved`; its error is
    then error / (1 + error s), with s the precision so far. Where one step costs d error / 2 nats
    a coefficient, many cost ln(1 + d error) / 2: what one would under a prior of variance
    1 / d + error, DDPM's p(x_{t-1} | x_t) with the best variance for each band. As many steps as
    have ``target_bits`` each. Only + - * / and square roots, exactly rounded: the same everywhere.
    """
    mean = int(np.rint(error * 2.0**40).astype(np.int64).sum()) / len(error) * 2.0**-40
    root = 1.0 + d * mean
    steps = [_step(d, 0.0, error)]
    while mean > 0.0 and len(steps) < STEPS:
        more, root = 2 * len(steps), math.sqrt(root)
        ends, power = [0.0], 1.0
        for _ in range(more - 1):  # 1 + error s grows by the same factor each time
            power *= root
            ends.append((power - 1.0) / mean)
        finer = [_step(b - a, a, error) for a, b in zip(ends, [*ends[1:], d], strict=True)]
        total = n * sum(int(micro(step.kl_bits).sum()) for step in finer)
        if total < more * round(target_bits * 2**20) or min(step.precision for step in finer) <= 0:
            break
        steps = finer
    return steps


def _step(d: float, before: float, error: Floats) -> Step:
    return Step(d, before, 0.5 * d * (error / (1.0 + before * error)) * BITS_PER_NAT)


def moved(x0_hat: Floats, error: Floats, y: Floats, s: float) -> Floats:
    """The expectation of x_0 after an observation y of precision s; error: that of x0_hat.

    As if x_0 ~ N(x0_hat, error). Arrays that go together.
    """
    return (x0_hat + error * s * y) / (1.0 + error * s)


def plan(snr: Floats, error: Floats, n: Floats, level_bits: float, chunk_bits: float) -> list[int]:
    """Which of K levels to visit on the way to the last, so that all coefficients cost least.

    snr: (K,) precisions, rising; error: (K + 1, B) mean E(x_0 - x0_hat)^2 of the bands before
    anything is known and after each; n: (B,) coefficients of each band. A level costs its KL (in
    two steps, see :func:`split`: sqrt(1 + D error) - 1 nats a coefficient), its chunks' overhead
    and its record; many small ones have the sharper priors. Dynamic programming over the last.
    Returns indices into ``snr``, rising, the last being K - 1.
    """
    at = np.concatenate([[0.0], snr])
    best, come = np.zeros(len(at)), np.zeros(len(at), dtype=np.int64)
    for j in range(1, len(at)):
        kl = (np.sqrt(1.0 + (at[j] - at[:j])[:, None] * error[:j]) - 1.0) @ n * BITS_PER_NAT
        cost = best[:j] + kl * (1 + OVERHEAD / chunk_bits) + OVERHEAD + level_bits
        come[j] = int(cost.argmin())
        best[j] = cost[come[j]]
    path, j = [], len(at) - 1
    while j:
        path.append(j - 1)
        j = int(come[j])
    return path[::-1]


def encode(
    mu: Floats, bounds: Ints, key: tuple[int, int], effort: int = EFFORT
) -> tuple[Ints, Floats]:
    """Simulate z ~ N(mu, I) so that :func:`decode` finds the same z from few bits.

    mu: (n,); bounds: from :func:`partition`; key: (seed, stream), each in [0, 2^64), never the
    same for two calls. ``effort``: log2 of the candidates per search. The decoder need not know,
    but the tables were fitted for EFFORT.
    Returns indices (at least n_chunks,), one of each chunk, then two for every SPLIT among the
    ones before, and so on; and z (n,), bit for bit the decoder's on the same machine. Raises
    ValueError if mu is not finite or absurdly large.
    """

    def search(chunk: int, a: int, b: int) -> list[list[int]]:
        return _Search(mu[a:b], key, chunk, 2.0**effort).run()

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy lets other threads run
        trees = pool.map(search, range(len(bounds)), bounds[:-1].tolist(), bounds[1:].tolist())
        layers: list[list[int]] = []
        for tree in trees:
            for depth, layer in enumerate(tree):
                if depth == len(layers):
                    layers.append([])
                layers[depth] += layer
    indices = np.array([i for layer in layers for i in layer], dtype=np.int64)
    if len(indices) > _max_nodes(len(bounds) - 1) or len(layers) > MAX_DEPTH + 1:
        raise ValueError("the observations are too far from the prior to be coded")
    return indices, decode(indices, bounds, key)


def decode(indices: Ints, bounds: Ints, key: tuple[int, int]) -> Floats:
    """The z that :func:`encode` simulated: (n,). Raises FormatError if indices are malformed."""
    z = np.zeros(int(bounds[-1]))
    # Nodes of the layer: chunk, position in its binary tree (heap order) and share of z.
    chunks = np.arange(len(bounds) - 1)
    paths = np.ones(len(chunks), dtype=np.int64)
    scale = 1.0
    for layer in _layers(indices, len(chunks)):
        for chunk, path, index in zip(chunks.tolist(), paths.tolist(), layer.tolist(), strict=True):
            if index != SPLIT:
                a, b = int(bounds[chunk]), int(bounds[chunk + 1])
                z[a:b] += scale * _candidate(key, chunk, path, index, b - a)
        split = layer == SPLIT
        chunks = np.repeat(chunks[split], 2)
        paths = np.repeat(2 * paths[split], 2) + np.tile([0, 1], int(split.sum()))
        scale *= math.sqrt(0.5)
    return z


def _max_nodes(n_chunks: int) -> int:
    return 2**18 + 8 * n_chunks


def _layers(indices: Ints, n_chunks: int) -> Iterator[Ints]:
    start, size = 0, n_chunks
    while size:
        layer = indices[start : start + size]
        if len(layer) < size:
            raise FormatError("too few indices")
        yield layer
        start, size = start + size, 2 * int((layer == SPLIT).sum())
    if start != len(indices):
        raise FormatError("too many indices")


def micro(kl_bits: Floats) -> Ints:
    """Expectations as integers, 2^-20 bits each, so that their sums are the same everywhere."""
    return np.rint(np.asarray(kl_bits, dtype=np.float64) * 2**20).astype(np.int64)


# --- the indices' code ------------------------------------------------------------------------


def expectations(kl_bits: Floats, bounds: Ints) -> Ints:
    """(n_chunks,) expected KL of each chunk, in units of 2^-20 bits: what its code depends on."""
    total = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(micro(kl_bits))])
    expected: Ints = total[bounds[1:]] - total[bounds[:-1]]
    return expected


def write_indices(encoder: stream.queue.RangeEncoder, indices: Ints, expected: Ints) -> None:
    """Append the indices of :func:`encode`. expected: (n_chunks,) from :func:`expectations`."""
    for layer, rows in _layers_and_rows(indices, expected):
        lengths = _bit_lengths(layer)
        encoder.encode(lengths.astype(np.int32), CATEGORICAL, _laws()[rows])
        for low, high in PIECES:
            some = lengths > low + 1
            size = np.int64(1) << (np.minimum(lengths[some] - 1, high) - low)
            if some.any():
                piece = (layer[some] >> low) & (size - 1)
                encoder.encode(piece.astype(np.int32), UNIFORM, size.astype(np.int32))


def read_indices(decoder: stream.queue.RangeDecoder, expected: Ints) -> Ints:
    """The inverse of :func:`write_indices`. Raises FormatError on more splits than allowed."""
    layers: list[Ints] = []
    rows, total = _rows(expected), 0
    while len(rows):
        total += len(rows)
        if total > _max_nodes(len(expected)) or len(layers) > MAX_DEPTH:
            raise FormatError("the indices split without end")
        lengths = np.asarray(decoder.decode(CATEGORICAL, _laws()[rows]), dtype=np.int64)
        layer = np.where(lengths > 0, np.int64(1) << np.maximum(lengths - 1, 0), SPLIT)
        for low, high in PIECES:
            some = lengths > low + 1
            size = np.int64(1) << (np.minimum(lengths[some] - 1, high) - low)
            if some.any():
                piece = np.asarray(decoder.decode(UNIFORM, size.astype(np.int32)), dtype=np.int64)
                layer[some] |= piece << low
        layers.append(layer)
        rows = np.zeros(2 * int((layer == SPLIT).sum()), dtype=np.int64)
    return np.concatenate([np.zeros(0, dtype=np.int64), *layers])


def ideal_bits(indices: Ints, expected: Ints) -> float:
    """The length of the indices' code under its own tables."""
    bits = 0.0
    for layer, rows in _layers_and_rows(indices, expected):
        lengths = _bit_lengths(layer)
        bits -= float(np.log2(_laws()[rows, lengths]).sum())
        bits += float(np.maximum(lengths - 1, 0).sum())
    return bits


@cache
def _laws() -> Floats:
    """(1 + CLASSES, 1 + MAX_BITS): probability of SPLIT, then of each bit length of an index.

    Row 4K for a chunk of K expected bits; row 0 for the halves of anything. The logarithm of the
    index is that of w(z), about normal with mean K and variance 2 K / ln 2 (a Gaussian's
    information density), cut off below 1, where it piles up, and past EFFORT, where the search
    ends. An index is uniform given its bit length. (1 + x / 8)^-8 stands for exp(-x), and the
    constants are fits to simulations: only + * / on doubles, elementwise, so that all machines
    agree.
    """
    k = np.arange(1.0 + CLASSES)[:, None] / 4
    k[0] = 12.0
    z = np.arange(1.0, 1 + MAX_BITS) - (k - 1.0)
    t = 1.0 + z * z / (16.0 * (2.885 * k + 4.0))
    t = t * t
    t = t * t
    inner = 1.0 / (t * t)
    inner[:, 0] = inner[:, 0] * 2.0
    past = 1.0
    for b in range(EFFORT, MAX_BITS):
        past = past * 0.4
        inner[:, b] = inner[:, b] * past
    total = np.zeros((len(k), 1))
    for b in range(MAX_BITS):
        total = total + inner[:, b : b + 1]
    fourth = k * k * k * k
    split = fourth / (fourth + 80000.0)
    split[0] = 0.1
    laws = np.concatenate([split, inner / total * (1.0 - split)], axis=1)
    # Counts of at least one; what rounding leaves over goes to the index 1.
    counts = np.floor(laws * (SPAN - 1 - MAX_BITS)).astype(np.int64) + 1
    counts[:, 1] += SPAN - counts.sum(axis=1)
    return counts.astype(np.float64) / SPAN


def _rows(expected: Ints) -> Ints:
    rows: Ints = np.clip(expected >> 18, 1, CLASSES)
    return rows


def _layers_and_rows(indices: Ints, expected: Ints) -> Iterator[tuple[Ints, Ints]]:
    for depth, layer in enumerate(_layers(indices, len(expected))):
        yield layer, _rows(expected) if depth == 0 else np.zeros(len(layer), dtype=np.int64)


def _bit_lengths(indices: Ints) -> Ints:
    return np.frexp(indices.astype(np.float64))[1].astype(np.int64)


# --- the search ------------------------------------------------------------------------------


class _Search:
    """The encoder's side of one chunk."""

    def __init__(self, mu: Floats, key: tuple[int, int], chunk: int, bound: float) -> None:
        self.n, self.key, self.chunk, self.bound = len(mu), key, chunk, bound
        self.norm = float(np.sqrt(np.square(mu, dtype=np.float64).sum()))
        if not self.norm <= MAX_NORM:
            raise ValueError(f"chunk {chunk}: |mu| = {self.norm} is more than {MAX_NORM}")
        self.direction = mu / max(self.norm, 1e-300)

    def run(self) -> list[list[int]]:
        """The chunk's indices, layer by layer of its tree."""
        self.layers: list[list[int]] = []
        self._tilted(self.norm, path=1, depth=0)
        return self.layers

    def _tilted(self, r: float, path: int, depth: int) -> None:
        """Simulate s ~ N(r, 1); halve at once what is hopeless."""
        if r <= 6.0:
            self._simulate(lambda s: np.exp(r * s - r * r / 2), path, depth)
            return
        self._send(SPLIT, depth)
        for half in (2 * path, 2 * path + 1):
            self._tilted(r * math.sqrt(0.5), half, depth + 1)

    def _simulate(self, weight: Weight, path: int, depth: int) -> float:
        """Simulate s with density weight(s) N(s; 0, 1); returns it."""
        w = weight(GRID)
        total = float(MASS @ w)
        bound = min(self.bound, _bound(w / total))
        body = float(MASS @ np.minimum(w / total, bound))
        if body < 0.5:  # next to nothing to be had from one search
            bound = body = 0.0
        if body == 0.0 or self._coin(path) >= body:
            return self._halve(lambda s: np.maximum(weight(s) / total - bound, 0.0), path, depth)
        index, s = self._select(
            lambda s: np.minimum(weight(s) / total, bound) / body,
            min(bound, float(w[-1]) / total) / body,
            path,
        )
        self._send(index, depth)
        return s

    def _halve(self, weight: Weight, path: int, depth: int) -> float:
        """Simulate s = (s_1 + s_2) / sqrt(2) in two steps."""
        self._send(SPLIT, depth)
        root = math.sqrt(0.5)
        s_1 = self._simulate(_first_half(weight), 2 * path, depth + 1)
        s_2 = self._simulate(lambda s: weight(root * (s_1 + s)), 2 * path + 1, depth + 1)
        return root * (s_1 + s_2)

    def _select(self, weight: Weight, bound: float, path: int) -> tuple[int, float]:
        """Poisson functional representation with weight <= bound: the index, from 1, and its s."""
        words = _words_each(self.n)
        candidates = _raw(self.key, self.chunk, path, CANDIDATES, 0)
        arrivals = _raw(self.key, self.chunk, path, PRIVATE, 1)
        direction = np.zeros(2 * words, dtype=np.float32)
        direction[: self.n] = self.direction
        size = max(1, min(BATCH // (2 * words), int(bound) + 1))
        best, index, seen, t = math.inf, 0, 0, 0.0
        while t <= best * bound:
            s = _quick_normals(candidates(size * words)).reshape(size, -1) @ direction
            times = t + np.cumsum(-np.log(_unit(arrivals(size))))
            scores = times / np.maximum(weight(s.astype(np.float64)), 1e-300)
            k = int(scores.argmin())
            if scores[k] < best:
                best, index = float(scores[k]), seen + k + 1
            seen, t = seen + size, float(times[-1])
        z = _candidate(self.key, self.chunk, path, index, self.n)
        return index, float(z @ self.direction)

    def _coin(self, path: int) -> float:
        return float(_unit(_raw(self.key, self.chunk, path, PRIVATE, 0)(1))[0])

    def _send(self, index: int, depth: int) -> None:
        if depth == len(self.layers):
            self.layers.append([])
        self.layers[depth].append(index)


def _first_half(weight: Weight) -> Weight:
    """E[weight((s_1 + s_2) / sqrt(2)) | s_1], over s_2 ~ N(0, 1)."""
    s_1 = GRID[::2]
    mass = MASS[INNER] / MASS[INNER].sum()
    log_mean = np.log(np.maximum(weight((s_1[:, None] + GRID[INNER]) * 0.5**0.5) @ mass, 1e-300))
    return lambda s: np.exp(np.interp(s, s_1, log_mean))


def _bound(w: Floats) -> float:
    """The least c with E[(w - c)+] <= RARE. w: on GRID, nondecreasing, mean 1."""
    above = np.cumsum(MASS[::-1])[::-1]
    excess = np.cumsum((MASS * w)[::-1])[::-1] - w * above
    return float(w[np.argmax(excess <= RARE)])


# --- candidates ------------------------------------------------------------------------------
# A normal is the inverse of the normal distribution function at a 32-bit fraction: no rejection, so
# a candidate's place in the generator's output is known without producing those before it.


def _raw(
    key: tuple[int, int], chunk: int, path: int, stream: int, first: int
) -> Callable[[int], NDArray[np.uint64]]:
    """Philox 4x64 (Salmon et al. 2011) from its ``first`` word on, for one node of one chunk.

    Only the raw words, which numpy promises never to change.
    """
    counter = np.array([first // 4, stream, path, chunk], dtype=np.uint64)
    generator = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=counter)
    generator.random_raw(first % 4)
    raw: Callable[[int], NDArray[np.uint64]] = generator.random_raw
    return raw


def _words_each(n: int) -> int:
    return (n + 1) // 2


def _unit(words: NDArray[np.uint64]) -> Floats:
    """Uniform on (0, 1)."""
    u: Floats = (words >> np.uint64(12)).astype(np.float64) * 2.0**-52 + 2.0**-53
    return u


def _normals(fractions: NDArray[np.uint32]) -> Floats:
    """Phi^-1((fraction + 1/2) / 2^32), to the last digits."""
    inverse = NormalDist().inv_cdf
    p = (fractions.ravel() + 0.5) * 2.0**-32
    return np.fromiter(map(inverse, p.tolist()), np.float64, p.size).reshape(fractions.shape)


@cache
def _table() -> NDArray[np.float32]:
    """(2^16,) normals for the upper halves of fractions."""
    return _normals(np.arange(2**15, 2**32, 2**16, dtype=np.uint32)).astype(np.float32)


def _quick_normals(words: NDArray[np.uint64]) -> NDArray[np.float32]:
    """The same normals, two per word, from a table; exact in the tails where the table is coarse.

    The table errs by less than 0.01 (2e-5 in the mean), and only in the encoder's weights.
    """
    fractions = words.astype("<u8", copy=False).view("<u4")
    upper = fractions.view("<u2")[1::2]
    z: NDArray[np.float32] = _table().take(upper)
    tails = np.flatnonzero(upper + np.uint16(16) < 32)
    z[tails] = _normals(fractions[tails])
    return z


def _candidate(key: tuple[int, int], chunk: int, path: int, index: int, n: int) -> Floats:
    """(n,): the candidate with this index, counted from 1."""
    words = _words_each(n)
    raw = _raw(key, chunk, path, CANDIDATES, (index - 1) * words)(words)
    return _normals(raw.astype("<u8", copy=False).view("<u4")[:n])
