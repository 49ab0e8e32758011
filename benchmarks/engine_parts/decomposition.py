"""The eigenvectors a soft constraint keeps, against `torch.linalg.eigh` of the whole matrix."""

from __future__ import annotations

import threading
import time

import torch

from space_peft.null_space.spectral import decompose

from .timing import in_turns


STRENGTH = 0.3


def spectra(d: int) -> dict[str, torch.Tensor]:
    """Eigenvalues with mean 1. The first is that of SmolLM2-135M's layer 10, feed-forward (docs/decisions.md), in shape;
    the last, four outliers on a bulk that is nearly flat, is the hardest: there is no gap anywhere near the d / 32."""
    places = torch.arange(1, d + 1, dtype=torch.float64)
    smollm = places**-0.9
    smollm[0] *= 10
    flat = torch.where(places <= 4, 0.5 * d / places**2, 0.02 + 1.5 * (1 - (places / d).sqrt()) ** 2)
    named = {"as SmolLM2": smollm, "i^-1": 1 / places, "i^-1/2": places**-0.5, "outliers, flat bulk": flat}
    return {name: values / values.mean() for name, values in named.items()}


def random_basis(d: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q


def filter_error(c: torch.Tensor, exact, found, rank: int) -> float:
    """`||P - P_exact||_2` of the soft filters of that rank, by power iteration in float64."""

    def filtered(values, vectors, x):
        values = values.double()
        outside = float(STRENGTH / (values[rank] + STRENGTH))
        gains = STRENGTH / (values[:rank] + STRENGTH) - outside
        u = vectors[:, :rank].double()
        return outside * x + u @ (gains[:, None] * (u.T @ x))

    x = torch.randn(len(c), 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(c.device)
    for _ in range(40):
        x = torch.linalg.qr(x).Q
        x = filtered(*found, x) - filtered(*exact, x)
    return float(torch.linalg.matrix_norm(x, 2))


def peak_matrices(work, d: int) -> float:
    """Largest memory taken on top of what there was, in float32 matrices `(d, d)`, by sampling this process's size."""
    pages, stop, peak = [], threading.Event(), 0

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    def sample():
        while not stop.is_set():
            pages.append(resident())
            time.sleep(0.001)

    before = resident()
    thread = threading.Thread(target=sample)
    thread.start()
    work()
    stop.set()
    thread.join()
    peak = max(pages, default=before)
    return (peak - before) / (4 * d * d)


def measure(smoke: bool, device: str) -> dict:
    rows = []
    for d in (512,) if smoke else (1024, 2048, 4096):
        rank = d // 32  # Where a part pays. The default keeps d / 4, and then LAPACK finds all of them as fast.
        basis = random_basis(d).to(device)
        for name, values in spectra(d).items():
            c64 = (basis * values.to(device)) @ basis.T
            c = c64.float()
            # The filter of the true eigenpairs is the reference; eigh in float32 is what is to be beaten.
            exact = (values.to(device), basis)

            def ours(c=c, rank=rank):
                return decompose(c, rank + 1, lambda v: STRENGTH / (v + STRENGTH) ** 2)

            def full(c=c):
                return torch.linalg.eigh(c)

            memory = peak_matrices(ours, d)
            timing = in_turns(ours, full, 1 if smoke else 5)
            found = ours()
            full_values, full_vectors = (part.flip(-1) for part in full())
            rows.append(
                {
                    "d": d,
                    "rank": rank,
                    "spectrum": name,
                    "speedup": round(1 / timing["ratio"], 2),
                    "error": filter_error(c64, exact, (found.values, found.vectors), rank),
                    "error_of_eigh_float32": filter_error(c64, exact, (full_values, full_vectors), rank),
                    "seconds": timing["seconds"],
                    "seconds_of_eigh_float32": timing["seconds_reference"],
                    "extra_memory_in_d_x_d_float32": round(memory, 3),
                }
            )
            print(rows[-1], flush=True)
    return {"decomposition": rows}
