"""One cell of the matrix: train one form of adapter on one family, merge it with the program, compare with PEFT."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch.nn import Module
from transformers.pytorch_utils import Conv1D

from families import FAMILIES, Family, Tower
from forms import FORMS, DoesNotApply

# Two outputs are equal where no number differs by more than this share of the largest one, or of 1.
TOLERANCE = 2e-4
# The adapter must change the outputs by this many tolerances; it is made stronger until it does.
CLEARLY = 50
STRENGTHS = (0.5, 1.0, 2.0, 4.0)

RANK, ALPHA = 4, 8

NONE_DIFFERS = "no weight differs"

# One cell of so many is also merged in place, and taken out again.
ROUND_TRIPS = 8

Outputs = dict[str, torch.Tensor]


# Models ---------------------------------------------------------------------------------------------------------------


@dataclass
class Base:
    """A family's checkpoint on disk and what it computes."""

    name: str
    folder: Path
    outputs: Outputs = field(default_factory=dict)
    report: dict = field(default_factory=dict)

    @property
    def family(self) -> Family:
        return FAMILIES[self.name]

    def load(self, folder: Path | None = None) -> tuple[Module, dict]:
        """The model in `folder`, and which keys did not match."""
        folder = folder or self.folder
        config = json.loads((folder / "config.json").read_text())
        model_class = getattr(tf, config["architectures"][0])
        model, info = model_class.from_pretrained(folder, output_loading_info=True)
        kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        return model.eval(), {kind: sorted(map(str, info.get(kind) or ())) for kind in kinds}

    def compute(self, model: Module) -> Outputs:
        torch.manual_seed(0)
        with torch.no_grad():
            answer = model(**self.family.inputs())
        return {name: answer[name].clone() for name in self.family.outputs}


def open_base(name: str, folder: Path) -> Base:
    base = Base(name, folder)
    model, base.report = base.load()
    base.outputs = base.compute(model)
    return base


def distance(reference: Outputs, other: Outputs) -> float:
    """The largest difference, in tolerances."""
    worst = 0.0
    for name, expected in reference.items():
        if expected.shape != other[name].shape or not other[name].isfinite().all():
            return float("inf")
        tolerance = TOLERANCE * max(1.0, expected.abs().max().item())
        worst = max(worst, (expected - other[name]).abs().max().item() / tolerance)
    return worst


# Parts ----------------------------------------------------------------------------------------------------------------


def bare_part(model: Module, folder: Path) -> Module:
    try:
        part = tf.AutoModel.from_pretrained(folder)
    except ValueError as error:
        raise DoesNotApply(f"`AutoModel` does not know it: {error}") from error
    if type(part) is type(model):
        raise DoesNotApply("it is the bare model already")
    return part.eval()


def graft_bare(model: Module, part: Module) -> None:
    prefix = model.base_model_prefix
    if hasattr(model, prefix):
        setattr(model, prefix, part)
    else:
        for name, module in part.named_children():
            setattr(model, name, module)


def tower_of(family: Family, part: str) -> Tower | None:
    """The part of the model that is trained; `None` for the whole."""
    if part == "whole":
        return None
    if part == "bare":
        return Tower(bare_part, graft_bare, "FEATURE_EXTRACTION")
    if part not in family.towers:
        raise DoesNotApply(f"the family has no {part} tower with a model class of its own")
    return family.towers[part]


# Training -------------------------------------------------------------------------------------------------------------


def fill(model: Module, originals: dict[str, torch.Tensor], seed: str, strength: float) -> None:
    """Gives every trainable parameter random values, in place, so that what is tied stays tied."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            noise = torch.randn(parameter.shape, generator=generator) * strength
            if "lora_magnitude_vector" in name:
                parameter.copy_(originals[name] * (1 + 0.3 * noise.tanh()))
            elif "lora_" in name:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(originals[name] + 0.2 * noise)


def merged_alone(layer: BaseTunerLayer, parameter: str) -> torch.Tensor:
    """The parameter of a layer with an adapter, merged by PEFT into a copy that is tied to nothing."""
    base = layer.get_base_layer()
    originals = dict(base.named_parameters(recurse=False))
    try:
        for name, original in originals.items():
            setattr(base, name, torch.nn.Parameter(original.detach().clone(), requires_grad=False))
        while isinstance(layer, BaseTunerLayer):
            layer.merge()
            layer.merged_adapters.clear()
            layer = layer.base_layer
        return getattr(base, parameter).detach()
    finally:
        for name, original in originals.items():
            setattr(base, name, original)


def effective(model: Module, name: str) -> torch.Tensor:
    """The parameter `name` of the base model as the adapter makes it, whatever it is tied to."""
    path, _, parameter = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, ModulesToSaveWrapper):
        module = module.modules_to_save["default"]
    elif isinstance(module, AuxiliaryTrainingWrapper):
        if parameter == "weight":
            return module.token_adapter.get_merged_weights(["default"]).detach()
        module = module.original_module
    elif isinstance(module, BaseTunerLayer):
        return merged_alone(module, parameter)
    return getattr(module, parameter).detach()


@dataclass
class Truth:
    """What this test knows of a trained adapter, and its file may not tell."""

    weights: dict[str, torch.Tensor]
    # Why no checkpoint with the base's tensors can hold the trained model; empty where one can.
    cannot_be_stored: str
    # By the last word of a parameter's module, or of a stack's own name: whether inputs come before outputs.
    is_in_out: dict[str, bool]

    @classmethod
    def of(cls, model: Module, groups: list[list[str]], is_in_out: dict[str, bool]) -> Truth:
        weights, why = {}, ""
        for name in (name for group in groups for name in group):
            try:
                weights[name] = effective(model, name)
            except Exception as error:  # PEFT's own merge refuses.
                why = f"PEFT's own merge refuses: {error}"
        for group in groups:
            known = [name for name in group if name in weights]
            for other in known[1:]:
                if not torch.allclose(weights[known[0]], weights[other], atol=1e-6):
                    why = why or f"{known[0]} and {other} are one tensor, and the adapter changes them differently"
        return cls(weights, why, is_in_out)

    def answer(self, hint: str) -> list[str] | None:
        """The options that the program's hint names, answered truthfully; `None` where there is nothing to answer."""
        if "--expert-order" in hint:
            return ["--expert-order", "rank-first"]
        if "--expert-axes" in hint:
            return ["--expert-axes", "in-out" if any(self.is_in_out.values()) else "out-in"]
        kinds = re.findall(r"--axes ([^\s=,]+)=", hint)
        if kinds:
            said = ["in-out" if self.is_in_out.get(kind.rpartition(".")[2], False) else "out-in" for kind in kinds]
            return [word for kind, axes in zip(kinds, said) for word in ("--axes", f"{kind}={axes}")]
        tied = re.search(r"--tied-[a-z]+", hint)
        if tied and not self.cannot_be_stored:
            return [tied[0]]
        return None

    def furthest(self, merged: Module) -> str:
        """The weights of `merged` that are not what they should be."""
        found = dict(merged.named_parameters(remove_duplicate=False))
        far = []
        for name, expected in self.weights.items():
            if name not in found or found[name].shape != expected.shape:
                far.append((float("inf"), name))
                continue
            difference = (found[name] - expected).abs().max().item()
            if difference > TOLERANCE * max(1.0, expected.abs().max().item()):
                far.append((difference, name))
        far.sort(reverse=True)
        told = ", ".join(f"{name} by {difference:.2g}" for difference, name in far[:3])
        return f"{len(far)} of {len(self.weights)} weights differ: {told}" if far else NONE_DIFFERS


def parameter_groups(model: Module) -> list[list[str]]:
    """The names of all parameters, those that are one tensor together."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return list(groups.values())


def axes_of(model: Module) -> dict[str, bool]:
    """Which weights lie with inputs before outputs, by the last word of the module's name and of the parameter's."""
    axes = {}
    for path, module in model.named_modules():
        is_in_out = isinstance(module, Conv1D) or bool(getattr(module, "is_transposed", False))
        axes[path.rpartition(".")[2]] = is_in_out
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3:
                axes[name] = is_in_out
    return axes


# Merging --------------------------------------------------------------------------------------------------------------


def train(base: Base, form_name: str, adapter: Path, result: dict) -> tuple[Outputs, Truth]:
    """Makes the adapter, saves it, and gives what the unmerged model computes."""
    form = FORMS[form_name]
    family = base.family
    tower = tower_of(family, form.part)
    model, _ = base.load()
    groups, axes = parameter_groups(model), axes_of(model)
    part = tower.take(model, base.folder) if tower else model
    settings = {"r": RANK, "lora_alpha": ALPHA, "task_type": tower.task if tower else family.task}
    settings |= form.settings(family, part)
    if tower and tower.attention:
        settings["target_modules"] = list(tower.attention)
    result["config"] = {key: value for key, value in settings.items() if value is not None}
    try:
        peft = get_peft_model(part, LoraConfig(**settings))
    except Exception as error:
        raise DoesNotApply(f"PEFT refuses: {type(error).__name__}: {error}") from error
    peft.eval()
    if tower:
        tower.graft(model, part)
    originals = {name: p.detach().clone() for name, p in peft.named_parameters() if p.requires_grad}
    for strength in STRENGTHS:
        fill(peft, originals, f"{base.name}/{form_name}", strength)
        try:
            reference = base.compute(model)
        except Exception as error:
            raise DoesNotApply(f"PEFT's own model fails: {type(error).__name__}: {error}") from error
        result["strength"], result["effect"] = strength, round(distance(reference, base.outputs), 1)
        if result["effect"] >= CLEARLY:
            break
    try:
        peft.save_pretrained(adapter)
    except Exception as error:
        raise DoesNotApply(f"PEFT cannot save it: {type(error).__name__}: {error}") from error
    return reference, Truth.of(model, groups, axes)


def reload(base: Base, form_name: str, adapter: Path, merged: bool = False) -> Outputs | None:
    """What PEFT computes with the adapter's file, beside the model or merged into it; `None` where it cannot."""
    tower = tower_of(base.family, FORMS[form_name].part)
    model, _ = base.load()
    part = tower.take(model, base.folder) if tower else model
    try:
        peft = PeftModel.from_pretrained(part, adapter).eval()
        if merged:
            part = peft.merge_and_unload()
        if tower:
            tower.graft(model, part)
        return base.compute(model)
    except Exception:
        return None


def merge(program: Path, base: Base, adapter: Path, out: Path, options: list[str]) -> tuple[int, dict]:
    """Merges the adapter into a new checkpoint."""
    shutil.rmtree(out, ignore_errors=True)
    return call(program, ["merge", base.folder, "-a", adapter, "-o", out, *options])


def call(program: Path, words: list) -> tuple[int, dict]:
    """Runs the program; gives the exit code and the document that says why it failed."""
    command = [program, *words, "--json", "--threads", "1"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120)
    try:
        document = json.loads(done.stdout) if done.returncode else {}
    except json.JSONDecodeError:
        document = {}
    if done.returncode and "error" not in document:
        document["error"] = (done.stderr or done.stdout).strip()
    return done.returncode, document


# In place -------------------------------------------------------------------------------------------------------------


def has_round_trip(family: str, form: str) -> bool:
    """Whether the cell also merges in place: every eighth, spread over families and forms."""
    return (list(FAMILIES).index(family) + list(FORMS).index(form)) % ROUND_TRIPS == 0


def round_trip(program: Path, base: Base, adapter: Path, merged: Path, copy: Path, options: list[str]) -> str:
    """Merges into a copy of the base, and takes the adapter out again; says what is not as it should be."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(base.folder, copy)
    code, document = call(program, ["merge", copy, "-a", adapter, "--in-place", "--keep-originals", *options])
    if code:
        return f"`merge --in-place` ends with {code}: {document['error']}"
    differing = differences(tensors_of(merged), tensors_of(copy))
    if differing:
        return f"in place these tensors are others than in a new checkpoint: {differing}"
    code, document = call(program, ["unmerge", copy])
    if code:
        return f"`unmerge` ends with {code}: {document['error']}"
    differing = differences(files_of(base.folder), files_of(copy))
    return f"after `unmerge` these files are not the base's: {differing}" if differing else ""


def tensors_of(folder: Path) -> dict[str, tuple]:
    """Type, shape and bytes of every tensor in the folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, info in json.loads(data[8:start]).items():
            if name != "__metadata__":
                first, end = info["data_offsets"]
                found[name] = (info["dtype"], info["shape"], data[start + first : start + end])
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def differences(expected: dict, found: dict) -> str:
    """The first names whose values are not the same; empty where all are."""
    names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# The whole cell -------------------------------------------------------------------------------------------------------


def short(text: str, *paths: Path) -> str:
    """The first 300 characters of one line, without the paths of this run."""
    for path in paths:
        text = text.replace(f"{path}/", "").replace(str(path), path.name)
    return " ".join(text.split())[:300]


def run_cell(base: Base, form_name: str, program: Path, folder: Path) -> dict:
    """Runs one cell and says how it ended."""
    result: dict = {"family": base.name, "form": form_name}
    adapter, out = folder / "adapter", folder / "merged"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        reference, truth = train(base, form_name, adapter, result)
    except DoesNotApply as error:
        return result | {"outcome": "does-not-apply", "reason": short(str(error))}
    if result["effect"] < CLEARLY:
        return result | {"outcome": "too-weak", "reason": f"the outputs change by {result['effect']} tolerances only"}
    again = reload(base, form_name, adapter)
    result["reload"] = round(distance(reference, again), 2) if again else float("inf")
    file_differs = "" if result["reload"] <= 1 else f"; PEFT's own reload is {result['reload']} tolerances away"
    if truth.cannot_be_stored:
        result["truth"] = truth.cannot_be_stored

    given: list[list[str]] = []
    code, document = merge(program, base, adapter, out, [])
    while code == 4:
        answer = truth.answer(document.get("hint") or "")
        if answer is None or answer in given:
            break
        result.setdefault("asked", short(document["error"], folder, base.folder.parent))
        given.append(answer)
        code, document = merge(program, base, adapter, out, sum(given, []))
    answers = sum(given, [])
    result |= {"exit": code, "answers": answers}
    if code:
        result["message"] = short(document["error"], folder, base.folder.parent)
        result["hint"] = document.get("hint")
        if code not in (3, 4):
            return result | {"outcome": "crash", "reason": f"exit code {code}: {result['message']}"}
        if truth.cannot_be_stored:
            reason = f"{truth.cannot_be_stored}. Program: {result['message']}"
            return result | {"outcome": "refused-rightly", "reason": reason + file_differs}
        return result | {"outcome": "refused", "reason": result["message"] + file_differs}

    merged, report = base.load(out)
    asked = "asked-" if answers else ""
    keys = {kind: sorted(set(report[kind]) - set(base.report[kind])) for kind in report}
    if any(keys.values()):
        told = "; ".join(f"{kind}: {', '.join(names[:4])}" for kind, names in keys.items() if names)
        return result | {"outcome": asked + "wrong", "reason": f"transformers reports {told}"}
    outputs = base.compute(merged)
    result["distance"] = round(distance(reference, outputs), 3)
    if result["distance"] <= 1:
        if has_round_trip(base.name, form_name):
            fault = round_trip(program, base, adapter, out, folder / "in-place", answers)
            result["round_trip"] = short(fault, folder, base.folder.parent) or "equal"
            if fault:
                return result | {"outcome": "not-in-place", "reason": result["round_trip"]}
        return result | {"outcome": asked + "equal"}
    if again and result["reload"] > 1 and distance(again, outputs) <= 1:
        return result | {"outcome": "equal-to-file", "reason": f"the file does not hold what was trained{file_differs}"}
    furthest = truth.furthest(merged)
    if furthest == NONE_DIFFERS and not truth.cannot_be_stored:
        by_peft = reload(base, form_name, adapter, merged=True)
        if by_peft and distance(by_peft, outputs) <= 1:
            reason = f"PEFT's unmerged model is {result['distance']} tolerances away from what PEFT merges"
            return result | {"outcome": "equal-to-peft-merge", "reason": reason}
    stored = f"; {truth.cannot_be_stored}" if truth.cannot_be_stored else ""
    reason = f"{result['distance']} tolerances away; {furthest}{stored}{file_differs}"
    return result | {"outcome": asked + "wrong", "reason": reason}
