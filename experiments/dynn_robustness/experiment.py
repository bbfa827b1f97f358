"""What leaving early changes for an attacker (arXiv 2308.08709), on Fashion-MNIST: transfer, early exits, compute.

Six convolutions, with and without exits, trained from the same weights on the same batches. Attacks see pixels in 0..1;
the threshold and the quotas come from the calibration split; test labels choose which images count and score.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dyncomp.evidence.seed import load_module
from dyncomp.exits import attacks as box
from dyncomp.exits import budgets

own = load_module(Path(__file__).with_name("networks.py"))
CHUNK, FOUR, MAIN, MODELS = own.CHUNK, own.FOUR, own.MAIN, own.MODELS
Net, Said, changed, figures_of, in_chunks = (
    own.Net, own.Said, own.changed, own.figures_of, own.in_chunks,
)  # fmt: skip

TITLE = "Attacks on networks that leave early"
COMPUTE = "cost"
PICTURES = Path(__file__).with_name("pictures.py")
METRICS = {
    "success": {"text": "percent of the images both networks get right whose answer changes"},
    "accuracy": {"text": "percent of the test images, attacked or not"},
    "cost": {"text": "mean FLOPs of an image; the whole network is 1", "minimize": True},
    "exit": {"text": "mean exit, counted from 1, of 4"},
    "closed": {"text": "percent of the gap between the clean mean exit and the last that closes"},
    "efficacy": {"text": "area under the share that has left by each cost"},
    "iterations": {"text": "PGD iterates until the answer changes, 22 where it never does"},
    "ever": {"text": "success of any iterate at any eps up to 8/255"},
    "early": {"text": "percent of the images wrong at all early exits and kept at the last"},
    "distance": {"text": "mean Euclidean distance to the image where the attack succeeds"},
}
NOISE = ["noise_on_static", "noise_on_dynamic"]
DESIGNS = ("heads_only", "six_exits", "early_exit", "late_exit", "q_0.5", "q_0.9", "q_0.99")
SLOW = ["slow", "slow_free", "slow_noise", "quota", "quota_slow", "quota_half", "peak", "peak_slow"]
SOURCES = {
    "static": ("static", "last"),
    "dynamic": ("dynamic", "taken"),
    "last": ("dynamic", "last"),
    "mean": ("dynamic", "mean"),
}
"""Arm -> the network that is attacked, and where the loss looks."""
CASES = {
    "early_1": (1.0, "random", "dynamic"),
    "early_0.1": (0.1, "random", "dynamic"),
    "early_0.01": (0.01, "random", "dynamic"),
    "early_image": (0.1, "image", "dynamic"),
    "early_heads_only": (0.1, "random", "heads_only"),
}
"""Arm -> alpha, start, network."""
TRANSFER = [f"{s}_on_{t}" for s in SOURCES for t in ("static", "dynamic")]
ARMS = [
    "static", "dynamic", "random", *TRANSFER, *NOISE, *(f"static_on_{d}" for d in (*DESIGNS, "random")),
    "cw_static", "cw_dynamic", *SLOW, *CASES,
]  # fmt: skip
TRIALS = dict.fromkeys(ARMS, 1)

EPS = (4 / 255, 8 / 255, 16 / 255)
GRID = (0.1, 0.15, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)
"""Thresholds of the released code; more than 1 is never reached."""
NEVER = 2.0
SLACK = 1.1


# ---- the parts of the evidence


class Evidence:
    """All arms of one seed; ``results`` fills up, ``shown`` is for the pictures."""

    def __init__(self, seed: int, lengths: Any, arrays: dict[str, Any]):
        self.seed, self.lengths = seed, lengths
        found = own.networks(seed, *arrays["train"], lengths)
        self.held = own.pixels_of(arrays["calibration"][0])
        self.nets = {
            "static": Net("static", found["static"], np.zeros(0, np.float32)),
            "dynamic": self.tuned("four", found["four"]),
            "heads_only": self.tuned("four", found["heads"]),
            "six_exits": self.tuned("six", found["six"]),
        }
        q, joint = self.nets["dynamic"].bars[0], self.nets["dynamic"]
        self.nets |= {"early_exit": joint.at([q, NEVER, NEVER]), "late_exit": joint.at([NEVER, NEVER, q])}  # fmt: skip
        self.nets |= {f"q_{q:g}": joint.at([q] * 3) for q in (0.5, 0.9, 0.99)}
        rows = np.random.default_rng([seed, 1]).permutation(len(arrays["test"][0]))[
            : lengths.images
        ]
        self.images, self.labels = own.pixels_of(arrays["test"][0][rows]), arrays["test"][1][rows]
        self.clean = {name: net.says(self.images) for name, net in self.nets.items()}
        self.results = {
            name: figures_of(self.nets[name], self.clean[name], self.labels)
            for name in ("static", "dynamic")
        }
        self.results["dynamic"]["threshold"] = float(q)
        self.shown: dict[str, Any] = {"labels": self.labels}
        self.show("clean", self.images)

    def tuned(self, kind: str, params: Any) -> Net:
        """At the largest threshold of the grid that keeps the mean exit at 0.55 of all or before (calibration)."""
        early = MODELS[kind].depth - 1
        net = Net(kind, params, np.full(early, GRID[0], np.float32))
        scores, wanted = net.says(self.held).scores, 0.55 * (early + 1)
        fits = [
            q for q in GRID if budgets.leaves_at(scores, np.full(early, q)).mean() + 1 <= wanted
        ]
        return net.at([max(fits, default=GRID[0])] * early)

    def right(self, *names: str) -> np.ndarray:
        """Images that all these networks get right."""
        return np.all([self.clean[name].answers == self.labels for name in names], axis=0)

    def show(self, name: str, pixels: np.ndarray, net: str = "dynamic") -> None:
        """Keeps attacked images with what the network says of them."""
        said = self.nets[net].says(pixels)
        self.shown |= {f"{name}_images": pixels, f"{name}_exit": said.exits, f"{name}_said": said.answers}  # fmt: skip

    def attack(self, source: str, eps: float, aim: str) -> Any:
        """PGD on every test image."""
        net, weights = self.nets[source], np.float32([name == aim for name in own.AIMS])
        run = functools.partial(own.pgd, net.params, net.bars, kind=net.kind)
        return in_chunks(lambda x, y: run(x, y, eps, weights), self.images, self.labels)

    def transfer(self) -> None:
        """Each side attacked, both sides tested; the designs tested on what the static network gives."""
        both = self.right("static", "dynamic")
        for name, (source, aim) in SOURCES.items():
            ever = np.zeros(len(self.labels), bool)
            for eps in EPS if name == source else (MAIN,):
                found = self.attack(source, eps, aim)
                ever |= found.hit
                suffix = "" if eps == MAIN else f"_{round(255 * eps)}"
                for target in ("static", "dynamic"):
                    arm = self.results.setdefault(f"{name}_on_{target}", {})
                    got = changed(self.nets[target], found.images, self.labels, both)
                    arm |= {f"{key}{suffix}": value for key, value in got.items()}
                if eps != MAIN:
                    continue
                arm = self.results[f"{name}_on_{source}"]
                arm["iterations"] = float(found.when[both].mean())
                if name == source:
                    arm["ever"] = 100.0 * float(ever[both].mean())
                if name == "static":
                    self.designs(found.images)
                if name == "dynamic":
                    self.show("pgd", found.images)
        noisy = np.asarray(box.sign_noise(jax.random.key(self.seed), self.images, MAIN))
        for target in ("static", "dynamic"):
            self.results[f"noise_on_{target}"] = changed(self.nets[target], noisy, self.labels, both)  # fmt: skip
        self.results["slow_noise"] = self.slowed(self.nets["dynamic"].says(noisy))

    def designs(self, pixels: np.ndarray) -> None:
        """Static-made examples on every design; images count that it and the static network get right."""
        for name in DESIGNS:
            counted = self.right("static", name)
            got = changed(self.nets[name], pixels, self.labels, counted)
            clean = figures_of(self.nets[name], self.clean[name], self.labels)
            got |= {"clean_accuracy": clean["accuracy"], "clean_cost": clean["cost"]}
            self.results[f"static_on_{name}"] = got
        # The same weights, but who leaves where is drawn.
        said = self.nets["dynamic"].says(pixels)
        before, after = (self.drawn(one) for one in (self.clean["dynamic"], said))
        counted = self.right("static") & (before.answers == self.labels)
        wrong = (after.answers != self.labels)[counted]
        got = figures_of(self.nets["dynamic"], after, self.labels)
        self.results["static_on_random"] = {"success": 100.0 * float(wrong.mean()), **got}

    def drawn(self, said: Any) -> Any:
        """As many leave at each exit, but at random."""
        rng = np.random.default_rng([self.seed, 2])
        return dataclasses.replace(said, exits=rng.permutation(said.exits))

    def distances(self) -> None:
        """Carlini and Wagner's attack on both."""
        rows = np.flatnonzero(self.right("static", "dynamic"))[: self.lengths.cw_images]
        for name in ("static", "dynamic"):
            net = self.nets[name]
            steps = self.lengths.cw_steps
            run = functools.partial(own.carlini, net.params, net.bars, kind=net.kind, steps=steps)
            found = in_chunks(run, self.images[rows], self.labels[rows])
            arm = {"success": 100.0 * float(found.hit.mean())}
            arm["distance"] = float(found.distance[found.hit].mean()) if found.hit.any() else 9.0
            key, length = jax.random.key(self.seed + 1), np.where(found.hit, found.distance, 1.0)
            noisy = np.asarray(
                box.gaussian_noise(key, self.images[rows], length.astype(np.float32))
            )
            for target in ("static", "dynamic"):
                wrong = self.nets[target].says(found.images).answers != self.labels[rows]
                arm[f"on_{target}"] = 100.0 * float(wrong.mean())
                wrong = self.nets[target].says(noisy).answers != self.labels[rows]
                arm[f"noise_on_{target}"] = 100.0 * float(wrong.mean())
            self.results[f"cw_{name}"] = arm

    def slowed(self, said: Said) -> dict[str, float]:
        """Figures of the dynamic network with the share of the gap that closed."""
        found = figures_of(self.nets["dynamic"], said, self.labels)
        start = self.results["dynamic"]["exit"]
        return {**found, "closed": 100.0 * (found["exit"] - start) / (FOUR.depth - start)}

    def compute(self) -> None:
        """Slowdown attacks, and what a quota or a deepest exit make of them."""
        net, labels = self.nets["dynamic"], self.labels
        run = functools.partial(own.slow_down, net.params, net.bars)
        attack = lambda keep: in_chunks(lambda x: run(x, keep), self.images).images
        slow = attack(1.0)
        said = {"slow": net.says(slow), "slow_free": net.says(attack(0.0))}
        self.show("slow", slow)
        clean = self.clean["dynamic"]
        self.results["random"] = figures_of(net, self.drawn(clean), labels)
        self.results |= {name: self.slowed(one) for name, one in said.items()}
        quota = budgets.quota_of(net.says(self.held).exits, 3, SLACK)
        half = np.arange(len(labels)) % 2 == 0
        mixed = Said(
            np.where(half[None, :, None], clean.logits, said["slow"].logits),
            np.where(half[:, None], clean.scores, said["slow"].scores), clean.exits,
        )  # fmt: skip
        for name, one in (("quota", clean), ("quota_slow", said["slow"]), ("quota_half", mixed)):
            parts = [
                budgets.leaves_within(one.scores[at : at + CHUNK], net.bars, quota)
                for at in range(0, len(labels), CHUNK)
            ]
            bounded = dataclasses.replace(one, exits=np.concatenate(parts))
            self.results[name] = self.slowed(bounded)
            self.results[name]["most"] = budgets.most_within(net.costs, quota)
            if name == "quota_half":
                right = bounded.answers == labels
                self.results[name]["accuracy"] = 100.0 * float(right[half].mean())
        bars = net.bars.copy()
        bars[budgets.deepest_exit(net.costs, net.costs[-2])] = -np.inf
        for name, pixels in (("peak", self.images), ("peak_slow", slow)):
            self.results[name] = self.slowed(net.at(bars).says(pixels))

    def early_exits(self) -> None:
        """The attack on early exits alone."""
        lengths, pixels = self.lengths, self.images[: self.lengths.early_images]
        keys = jax.random.split(jax.random.key(self.seed), len(pixels))
        for name, (alpha, start, which) in CASES.items():
            net = self.nets[which]
            found = jax.device_get(
                own.early(
                    net.params,
                    pixels,
                    keys,
                    alpha,
                    start=start,
                    most=lengths.early_most,
                    least=lengths.early_least,
                )  # fmt: skip
            )
            self.results[name] = self.judged(net, pixels, found)
            if which == "dynamic":
                self.show(name, found.images)

    def judged(self, net: Net, pixels: np.ndarray, found: Any) -> dict[str, float]:
        """Success, distance, and a fresh pass over the successes; on the other network too."""
        y = net.says(pixels).logits[-1].argmax(-1)
        fresh = net.says(found.images).logits.argmax(-1)
        hit, rate = found.hit, lambda x: 100.0 * float(x.mean()) if x.size else 0.0
        other = self.nets["heads_only" if net is self.nets["dynamic"] else "dynamic"]
        theirs = other.says(found.images).logits.argmax(-1)
        moved = other.says(pixels).logits[-1].argmax(-1)
        passed = (theirs[:-1] != moved).all(0) & (theirs[-1] == moved)
        return {
            "early": rate(hit), "final_changed": rate(fresh[-1][hit] != y[hit]),
            "early_unchanged": rate(fresh[:-1][:, hit] == y[hit]), "transferred": rate(passed[hit]),
            "distance": float(found.distance[hit].mean() if hit.any() else found.distance.mean()),
            "steps": float(found.when.mean()),
            **{f"changed_{k + 1}": rate(row != y) for k, row in enumerate(fresh[:-1])},
        }  # fmt: skip


def run_seed(seed: int, quick: bool, workdir: Path) -> dict[str, dict[str, float]]:
    """All arms of one seed: arm -> metric -> value; shown_SEED.npz in ``workdir`` is for the pictures."""
    one = Evidence(seed, own.QUICK if quick else own.Lengths(), own.load(quick))
    one.transfer()
    one.distances()
    one.compute()
    one.early_exits()
    workdir.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(workdir / f"shown_{seed}.npz", **load_module(PICTURES).chosen(one.shown))
    return one.results


def figures(results: dict[str, Any], outdir: Path) -> None:
    """Writes the pictures of the page."""
    load_module(PICTURES).draw(results, outdir)
