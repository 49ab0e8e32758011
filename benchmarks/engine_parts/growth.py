"""How each cost grows: with tokens, dimension, rank and layers."""

from __future__ import annotations

import math

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from space_peft import NullSpaceFitter, SpaceLoraConfig
from space_peft.figures.style import save_figure, styled
from space_peft.null_space import NullSpace
from space_peft.null_space.spectral import decompose

from .decomposition import STRENGTH, random_basis, spectra
from .timing import seconds


def median(work, repeats: int) -> float:
    work()
    return sorted(seconds(work) for _ in range(repeats))[repeats // 2]


def null_space(d: int, k: int) -> NullSpace:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4 * k, d, generator=generator)
    return NullSpaceFitter(d, dtype=torch.float32).update(inputs).fit("soft", max_rank=k)


def measure(smoke: bool, device: str) -> dict:
    repeats = 1 if smoke else 5
    d, tokens = (64, 256) if smoke else (1024, 2048)
    points = {"tokens": [], "dimension": [], "rank": [], "layers": []}
    generator = torch.Generator().manual_seed(0)
    for n in (tokens // 8, tokens // 4, tokens // 2, tokens, 2 * tokens, 4 * tokens):
        x = torch.randn(n, d, generator=generator).to(device)
        fitter = NullSpaceFitter(d, dtype=torch.float32)
        points["tokens"].append((n, median(lambda fitter=fitter, x=x: fitter.update(x), repeats)))
    for size in (64, 128) if smoke else (256, 512, 1024, 2048, 4096):
        basis = random_basis(size)
        c = ((basis * spectra(size)["as SmolLM2"]) @ basis.T).float().to(device)
        rank = size // 32
        work = lambda c=c, rank=rank: decompose(c, rank + 1, lambda v: STRENGTH / (v + STRENGTH) ** 2)  # noqa: E731
        points["dimension"].append((size, median(work, repeats)))
    for k in (8, 16) if smoke else (8, 16, 32, 64, 128, 256, 512):
        space, a = null_space(d, k).to(device), torch.randn(8, d, generator=generator).to(device)
        points["rank"].append((k, median(lambda space=space, a=a: space.project(a), 20 * repeats)))
    space = null_space(d, SpaceLoraConfig().rank_limit(d)).to(device)
    for layers in (2, 4) if smoke else (8, 16, 32, 64, 128, 256):
        weights = [torch.randn(8, d, generator=generator).to(device) for _ in range(layers)]
        points["layers"].append(
            (layers, median(lambda weights=weights: [space.project(a) for a in weights], 3 * repeats))
        )
    return {"growth": {**points, "d": d, "default_rank": SpaceLoraConfig().rank_limit(d), "adapter_rank": 8}}


def draw(growth: dict, path: str) -> None:
    """Four panels, both axes logarithmic, with the slope of the last doubling."""
    d, rank = growth["d"], growth["default_rank"]
    titles = {
        "tokens": (f"statistics of one input, d = {d}", "tokens"),
        "dimension": ("decomposition at rank d / 32", "dimension d"),
        "rank": (f"projection of one layer's A, d = {d}", "eigenvectors kept"),
        "layers": (f"projection of all layers' A, d = {d}, rank {rank}", "layers"),
    }
    with styled():
        figure = Figure(figsize=(11, 7), layout="constrained")
        for axis, (key, (title, label)) in zip(figure.subplots(2, 2).flatten(), titles.items()):
            sizes, times = zip(*growth[key])
            axis.loglog(sizes, [1e3 * value for value in times], "o-")
            slope = math.log(times[-1] / times[-2]) / math.log(sizes[-1] / sizes[-2])
            axis.set_title(f"{title}\nlast doubling: ~ {label.split()[0]}^{slope:.1f}", loc="left", fontsize=10)
            axis.set(xlabel=label, ylabel="milliseconds")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axis.set_xticks([], minor=True)
            axis.grid(color="#e6e6e6", linewidth=0.7)
        save_figure(figure, path, 110)
