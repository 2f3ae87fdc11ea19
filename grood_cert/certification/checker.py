r"""Prove S < gamma or S > gamma on a whole ball anew, from a proof file and with numpy alone: `python checker.py PROOF`.

Given are network.npz beside the proof, x, norm, eps, gamma and T; S = -T logsumexp(f / T), pixels lie in [0, 1]. Row and
slopes may be any: what is proved holds. It holds for all v = W u + b + d, |d| <= unit m, m = |W| |u| + |b|, at each layer:
for the network in exact arithmetic and as float64 evaluates it. A row a of v pays unit |a| . m, which covers its own
rounding too: n float64 products add up to within n 2^-53 / (1 - n 2^-53) of their sizes, in any order.
* ReLU, l < 0 < u: above both ends there is a line above all (convexity); below, one through 0 of any slope in [0, 1].
* S < gamma: logsumexp z >= w . z - sum w log w for any w >= 0 of sum 1 (Gibbs).
* S > gamma: e^(f / T - M) <= r f + max over z = l, u of e^(z / T - M) - r z, for each logit in [l, u], any r (convexity).
"""

import hashlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
LARGEST, BLOCK, TINY = 2**31, 2**22, 1e-200  # bytes of a file, numbers in a block of rows, more than underflow can do


def unpacked(content: bytes) -> dict[str, Any]:
    """The arrays of an npz file without pickles, floats as float64, and what its text says."""
    file = np.load(io.BytesIO(content), allow_pickle=False)
    if sum(item.file_size for item in file.zip.infolist()) > LARGEST:
        raise ValueError("too large")
    found = {name: part if part.dtype.kind in "uU" else part.astype(np.float64) for name, part in file.items()}
    return found | {"text": json.loads(str(found["text"]))}


def apply(layer: dict[str, Any], weight: Array, rows: Array, back: bool = False) -> Array:
    """W v, or W^T v, of every row v; W is a zero-padded convolution in groups, of shape (groups, outs, ins, kh, kw)."""
    (sy, sx), (py, px), (height, width), (h, w) = (layer[name] for name in ("stride", "pad", "size", "out"))
    lead, (outs, ins) = (len(rows), len(weight)), weight.shape[1:3]
    padded = np.zeros((*lead, ins, height + 2 * py, width + 2 * px))
    image = padded[..., py : py + height, px : px + width]
    value = rows.reshape(*lead, outs, h * w) if back else np.zeros((*lead, outs, h * w))
    image[:] = 0 if back else rows.reshape(image.shape)
    for y, x in np.ndindex(weight.shape[3:]):
        seen = padded[..., y : y + (h - 1) * sy + 1 : sy, x : x + (w - 1) * sx + 1 : sx]
        if back:
            seen += (weight[..., y, x].swapaxes(1, 2) @ value).reshape(seen.shape)
        else:
            value += weight[..., y, x] @ seen.reshape(*lead, ins, h * w)
    return (image if back else value).reshape(len(rows), -1)


class Relaxation:
    """Intervals of all values and lines around all ReLUs over the ball; a layer reads the sum of earlier values."""

    def __init__(self, network: dict[str, Any], x: Array, norm: str, eps: float) -> None:
        self.network, self.layers, self.norm, self.eps, self.x = network, network["text"], norm, eps, x.ravel()
        largest = x.size + max(part.size for part in network.values() if isinstance(part, np.ndarray))
        self.unit, self.neurons = 2.0**-50 * (largest + sum(len(layer["reads"]) for layer in self.layers) + 64), 0
        low, high = np.nextafter(np.maximum(self.x - eps, 0), -1), np.nextafter(np.minimum(self.x + eps, 1), 2)
        self.ends, self.m, self.lines = [(low, high)], [np.maximum(-low, high) + TINY], {}
        for number, layer in enumerate(self.layers[1:], 1):
            reads = [range(number).index(i) for i in layer["reads"]]  # of earlier ones, or there is a ValueError
            low, high, size = np.sum([[*self.ends[i], np.maximum(-self.ends[i][0], self.ends[i][1])] for i in reads], 0)
            if (weight := network.get(f"weight{number}")) is not None:
                bias, middle = network[f"bias{number}"], (low + high) / 2
                spread = apply(layer, abs(weight), np.maximum(high - middle, middle - low)[None])[0]
                size = apply(layer, abs(weight), size[None])[0] + abs(bias)
                low, high = (apply(layer, weight, middle[None])[0] + bias + side * spread for side in (-1, 1))
            elif "leak" in layer and len(reads) == 1:
                found = np.flatnonzero((low < 0) & (high > 0))
                for units in filter(len, np.array_split(found, 1 + len(found) * largest // BLOCK)):
                    rows = 1.0 * (units[:, None] == np.arange(len(low)))
                    high[units] = np.minimum(high[units], self.upper(reads[0], rows))
                    low[units] = np.maximum(low[units], -self.upper(reads[0], -rows))
                leak, size, self.neurons = np.clip(layer["leak"], 0, 1), np.maximum(-low, high), self.neurons + len(low)
                chord = np.clip((high - leak * low) / (high - low), leak, 1)  # leak or 1 where the sign is fixed
                constant = np.maximum(0, np.maximum((leak - chord) * low, (1 - chord) * high))
                self.lines[number] = chord, constant, leak, slice(self.neurons - len(low), self.neurons)
                low, high = np.maximum(low, leak * low), np.maximum(high, leak * high)
            self.m.append(size + TINY)
            self.ends.append((low - self.unit * self.m[-1], high + self.unit * self.m[-1]))

    def upper(self, node: int, rows: Array, slopes: Array | None = None) -> Array:
        """Upper bounds of rows of a value; slopes in [0, 1] below all neurons, for each row."""
        pending, total = {node: rows}, TINY + (self.unit * abs(rows) + TINY) @ self.m[node]
        for number in range(node, 0, -1):
            if (row := pending.pop(number, None)) is not None:
                if number in self.lines:
                    chord, constant, leak, part = self.lines[number]
                    slope = leak + (1 - leak) * (chord > 0.5 if slopes is None else slopes[:, part])
                    positive, slope = np.maximum(row, 0), np.where(constant > 0, np.minimum(slope, 1), chord)
                    total += positive @ constant
                    row = positive * chord + (row - positive) * slope
                elif f"weight{number}" in self.network:
                    total += row @ self.network[f"bias{number}"]
                    row = apply(self.layers[number], self.network[f"weight{number}"], row, back=True)
                for i in self.layers[number]["reads"]:
                    pending[i] = pending.get(i, 0) + row
                    total += (self.unit * abs(pending[i]) + TINY) @ self.m[i]
        gain, power = abs(pending[0]), 1 if self.norm == "l1" else 2
        room = np.where(pending[0] > 0, self.ends[0][1] - self.x, self.x - self.ends[0][0])
        best = (1 + self.unit) * (gain * room).sum(1)  # over the box; with the ball, by weak duality for any price
        for share in np.geomspace(1 / 64, 1, 64 * (self.norm != "linf")):
            price = share * (gain.max(1) if power == 1 else np.sqrt((gain**2).sum(1)) / (2 * self.eps)) + TINY
            move = np.minimum(gain / (2 * price[:, None]), room) if power == 2 else room * (gain > price[:, None])
            gained, cost = (gain * move).sum(1), price * self.eps**power
            best = np.minimum(best, gained - price * (move**power).sum(1) + cost + self.unit * (2 * gained + cost))
        return np.asarray(total + pending[0] @ self.x + best)


def bound(network: dict[str, Any], claim: dict[str, Any], x: Array, row: Array, slopes: Array) -> float:
    """S_ub (decision "id") or S_lb ("ood") over the ball; NaN where nothing is proved."""
    inside, t, k, last = claim["decision"] == "id", claim["temperature"], len(row), len(network["text"]) - 1
    relaxed, slopes = Relaxation(network, x, claim["norm"], claim["eps"]), slopes / 255
    row = -abs(row) / abs(row).sum() if inside else row
    upper = relaxed.upper(last, row[None], slopes[:1])[0]
    if inside:
        entropy = (row * np.log(TINY - row)).sum()
        return float(upper - t * entropy + relaxed.unit * (1 + t * (1 + entropy) + abs(upper)))
    found = relaxed.upper(last, np.concatenate([-np.eye(k), np.eye(k)]), slopes[1:])
    ends = np.stack([np.maximum(relaxed.ends[-1][0], -found[:k]), np.minimum(relaxed.ends[-1][1], found[k:])])
    top, power = ends[1].max() / t, np.exp((ends - ends[1].max()) / t)
    rounding = abs(row * ends).sum() + abs(upper) + (power * (1 + abs(ends) / t + abs(top))).sum()
    value = -t * (top + np.log((power - row * ends).max(0).sum() + upper + relaxed.unit * rounding))
    return float(value - relaxed.unit * (1 + t + t * abs(top) + abs(value)))


def main() -> int:
    """Answers 0: proved; 1: not proved; 2: no proof."""
    try:
        path = Path(*sys.argv[1:])
        proof, content = unpacked(path.read_bytes()), path.with_name("network.npz").read_bytes()
        claim, x, eps, gamma = proof["text"], proof["x"], proof["text"]["eps"], proof["text"]["gamma"]
        fits = 1e-100 <= eps <= x.size and claim["norm"] in ("linf", "l2", "l1") and claim["decision"] in ("id", "ood")
        fits = fits and 0 < claim["temperature"] < np.inf and abs(gamma) < np.inf and 0 <= x.min() <= x.max() <= 1
        if not fits or proof["slopes"].dtype != np.uint8 or hashlib.sha256(content).hexdigest() != claim["network"]:
            raise ValueError("something is out of range, or network.npz beside it is another network")
        with np.errstate(all="ignore"):
            value = bound(unpacked(content), claim, x, proof["row"], proof["slopes"])
    except Exception as error:  # noqa: BLE001 (whatever it is, nothing is proved)
        print(f"no proof ({error!r}); usage: checker.py PROOF", file=sys.stderr)
        return 2
    sign, proved = ("<", value < gamma) if claim["decision"] == "id" else (">", value > gamma)
    ball = f"the whole {claim['norm']} ball of eps {eps} around {claim['name']!r}; S {sign}= {value} there"
    print(f"{'proved' if proved else 'NOT proved'}: S {sign} {gamma} on {ball}")
    return int(not proved)


if __name__ == "__main__":
    sys.exit(main())
