"""PEFT's Arrow: LoRAs routed per linear by |x · prototype|, a prototype being the direction that
an expert's B A stretches most (arXiv 2405.11157).

    task_{i}/, gks_{i}/   plain PEFT LoRAs
    arrow_router/         its adapter_config.json holds `arrow_config`
"""

from __future__ import annotations

from pathlib import Path

import torch
from vllm_adafuse.convert.beside import take_modules
from vllm_adafuse.convert.mixture import Linear, Mixture, Part
from vllm_adafuse.convert.options import Options
from vllm_adafuse.convert.peft_lora import read_lora
from vllm_adafuse.convert.source import Source, read_json, refuse
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.config import CONFIG_FILE
from vllm_adafuse.format.keys import is_int
from vllm_adafuse.text import show

KIND = "Arrow"
OPTIONS = ("gks",)
ROUTER = "arrow_router"
ITERATIONS, EPS = 15, 1e-8  # of PEFT's power iteration


def recognises_directory(path: Path) -> bool:
    """The layout that `save_pretrained` of an Arrow model writes."""
    return (path / ROUTER / CONFIG_FILE).is_file()


def base_of(path: Path) -> str | None:
    """The backbone that the source names."""
    return read_json(path / ROUTER / CONFIG_FILE).get("base_model_name_or_path")


def read_directory(path: Path, backbone: Backbone, options: Options) -> Mixture:
    """Reads the experts and computes their prototypes, which PEFT does not save."""
    arrow = read_json(path / ROUTER / CONFIG_FILE).get("arrow_config")
    where = f"{path / ROUTER / CONFIG_FILE}: `arrow_config`"
    if not isinstance(arrow, dict) or not arrow.get("task_adapter_names"):
        raise refuse(path, f"{where} is {show(arrow)}, expected an object with task_adapter_names")
    names, general = arrow["task_adapter_names"], arrow.get("gks_adapter_names") or []
    for listed in (names, general):
        if not isinstance(listed, list) or not all(
            isinstance(n, str) and n not in ("", ".", "..") and "/" not in n for n in listed
        ):
            raise refuse(path, f"{where}: lists {show(listed)}, expected names of directories")
    top_k, temperature = arrow.get("top_k", 3), arrow.get("router_temperature", 1.0)
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= len(names):
        raise refuse(
            path, f"{where}: top_k is {show(top_k)}, expected an integer from 1 to {len(names)}, "
            "the number of its experts",
        )
    notes = []
    experts = _read_all(path, names, backbone, notes)
    if arrow.get("use_gks"):
        subtracted = _read_all(path, general, backbone, notes)
        experts = _subtract(path, experts, subtracted, options.gks, notes)
    elif options.gks:
        raise refuse(path, f"{where}: use_gks is false, so --gks has nothing to decide; drop it")
    seed = arrow.get("rng_seed")
    if seed is not None and not is_int(-(1 << 63), (1 << 64) - 1)(seed):
        raise refuse(path, f"{where}: rng_seed is {show(seed)}, expected an integer or null")
    linears = {
        linear: Linear(
            experts=[parts[linear] for parts in experts],
            router=torch.stack([prototype(parts[linear], seed) for parts in experts]),
        )
        for linear in experts[0]
    }
    notes.append(
        "prototypes are not saved by PEFT and were computed here: "
        + (
            f"{ITERATIONS} power iterations from rng_seed {seed}, as PEFT does on a CPU (on a GPU "
            "its random numbers differ)"
            if seed is not None
            else f"to convergence. PEFT starts {ITERATIONS} iterations at random (rng_seed is "
            "null), so that its own routes vary a little from run to run"
        )
    )
    options_out = {"router.logits": "abs", "router.temperature": temperature}
    return Mixture(KIND, linears, top_k, options=options_out, expert_names=names, notes=notes)


def _read_all(
    path: Path, names: list[str], backbone: Backbone, notes: list[str]
) -> list[dict[str, Part]]:
    experts = []
    for name in names:
        source = Source.open(path / name)
        source.use_decoder_names()
        experts.append(read_lora(source, backbone))
        take_modules(source, backbone)
        source.finish()
        notes += [f"{name}: {note}" for note in source.notes]
    for name, parts in zip(names, experts):
        if parts.keys() != experts[0].keys():
            differing = sorted(parts.keys() ^ experts[0].keys())[0]
            raise refuse(
                path, f"{path / name}: adapts other linears than {names[0]} (the first: "
                f"{differing}), expected the same ones, as PEFT does; `vllm-adafuse "
                "compose-experts` takes LoRAs that differ",
            )
    return experts


def _subtract(path, experts, general, gks, notes) -> list[dict[str, Part]]:
    """General knowledge subtraction: the mean of the general LoRAs off every expert's A and B."""
    if gks is None:
        raise refuse(
            path, f"{path / ROUTER / CONFIG_FILE}: use_gks is true. PEFT subtracts the general "
            "LoRAs from the experts in place, at the first forward pass, and the files do not "
            "tell whether that had happened when they were saved; say --gks done if the model "
            "had run before it was saved, --gks subtract if not",
        )
    if gks == "done":
        notes.append("--gks done: the experts were taken as they are")
        return experts
    if not general:
        raise refuse(path, f"{path / ROUTER / CONFIG_FILE}: use_gks is true without general LoRAs")
    result = []
    for parts in experts:
        if any(other.keys() != parts.keys() for other in general):
            raise refuse(path, f"{path}: general and task LoRAs adapt different linears")
        result.append({
            linear: Part(
                part.a.float() - torch.stack([g[linear].a.float() for g in general]).mean(0),
                part.b.float() - torch.stack([g[linear].b.float() for g in general]).mean(0),
                part.alpha,
                part.rslora,
            )
            for linear, part in parts.items()
        })  # fmt: skip
    notes.append(f"--gks subtract: the mean of {len(general)} general LoRAs was subtracted")
    return result


def prototype(part: Part, seed: int | None) -> torch.Tensor:
    """The top right singular vector [in] of B A, its sign without meaning; float32.

    Args:
        part: the LoRA.
        seed: PEFT's `rng_seed`: its iteration is repeated. None: exact, from QR and SVD.
    """
    a, b = part.a.float(), part.b.float()
    if seed is None:
        # B A = Qb (Rb Ra^T) Qa^T: the small matrix has all of its singular values.
        qa, ra = torch.linalg.qr(a.double().T)
        _, rb = torch.linalg.qr(b.double())
        return (qa @ torch.linalg.svd(rb @ ra.T)[2][0]).float()
    gram = b.T @ b
    v = torch.randn(a.shape[1], generator=torch.Generator().manual_seed(int(seed)))
    v = v / (v.norm() + EPS)
    for _ in range(ITERATIONS):
        w = a.T @ (gram @ (a @ v))
        v = w / (w.norm() + EPS)
    return v
