"""Each item of docs/from-mergekit.md, "Different on purpose", against mergekit: `make test-mergekit` runs it.

An item is quoted by its words in bold and holds if mergekit does what it says of mergekit. What it says of us the test
suite holds. Every item has a check here; else the run fails, as it does where mergekit has changed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

PAGE = Path(__file__).parents[2] / "docs" / "from-mergekit.md"
HEADING = "## Different on purpose\n"
LIST = "merge_method: linear\nmodels: [{model: math, parameters: {weight: 1}}]\n"
OWN_CODE = """from pathlib import Path
from transformers import LlamaConfig
Path("ran").touch()
class Own(LlamaConfig):
    model_type = "owned"
"""


@dataclass(frozen=True)
class Theirs:
    """The mergekit of an environment, run in a folder with a base, two experts, and models made for the items."""

    tool: Path
    folder: Path

    def run(self, text: str, *flags: str, out: str, recipe: str = "r.yml") -> subprocess.CompletedProcess[str]:
        (self.folder / recipe).write_text(text)
        command = [str(self.tool.with_name("mergekit-yaml")), recipe, out, "--no-write-model-card", *flags]
        offline = os.environ | {"HF_HUB_OFFLINE": "1"}
        return subprocess.run(command, cwd=self.folder, env=offline, capture_output=True, text=True, timeout=600)

    def tensors(self, text: str, *flags: str, out: str) -> dict[str, Tensor]:
        """The tensors of a merge that must end well and say nothing of what is looked at."""
        done = self.run(text, *flags, out=out)
        assert done.returncode == 0, done.stderr[-500:]
        assert not re.search("warn|unknown|ignor|differ", done.stderr, re.I), done.stderr[-500:]
        files = sorted((self.folder / out).glob("*.safetensors"))
        return {name: value for file in files for name, value in load_file(file).items()}

    def files(self, out: str) -> set[str]:
        return {file.name for file in (self.folder / out).iterdir()}

    def copy(self, model: str, name: str) -> Path:
        return Path(shutil.copytree(self.folder / model, self.folder / name))


def _build(folder: Path) -> None:
    base = tiny.build("llama", folder / "base", dtype=torch.float32)
    for seed, name in enumerate(("math", "code"), 1):
        tiny.perturbed(base, folder / name, scale=0.05, seed=seed)


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- the items --------------------------------------------------------------------------------------------------------


def _first_mistake(theirs: Theirs) -> bool:
    done = theirs.run(LIST.replace("linear", "tise") + "dtype: int7\n", out="mistakes")
    fifty = "merge_method: ties\nbase_model: base\nmodels: [{model: math, parameters: {weight: 1, density: 50}}]\n"
    last = done.stderr.strip().splitlines()[-1]
    return (
        (done.returncode, "int7" in done.stderr, last.endswith("Unimplemented merge method tise")) == (1, False, True)
        and "Traceback" in done.stderr
        and bool(theirs.tensors(fifty, out="fifty"))
    )


def _silent_names(theirs: Theirs) -> bool:
    odd = LIST.replace("weight: 1", "weight: 1, wieght: 3") + "dtpye: float16\nparameters: {normalise: false}\n"
    odd += "notes: x\naim: {omega: 0.4}\nacm: {theta: 0.7}\n"
    return _same(theirs.tensors(LIST, out="plain"), theirs.tensors(odd, out="odd"))


def _last_key(theirs: Theirs) -> bool:
    return _same(theirs.tensors("merge_method: tise\n" + LIST, out="twice"), theirs.tensors(LIST, out="once"))


def _promoted(theirs: Theirs) -> bool:
    half = theirs.copy("math", "half") / "model.safetensors"
    save_file({n: t.bfloat16() for n, t in load_file(half).items()}, half, metadata={"format": "pt"})
    text = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: half}, {model: code}]\n"
    return {t.dtype for t in theirs.tensors(text, out="promoted").values()} == {torch.float32}


def _base_needs_weight(theirs: Theirs) -> bool:
    done = theirs.run(LIST + "base_model: base\n", out="unlisted")
    return done.returncode == 1 and "Missing required parameter weight for base" in done.stderr


def _cut(theirs: Theirs) -> bool:
    tokens = len(json.loads((theirs.folder / "base/tokenizer.json").read_text())["model"]["vocab"])
    text = "merge_method: linear\nbase_model: math\nmodels: [{model: math, parameters: {weight: 1}}]\n"
    made = theirs.tensors(text + "tokenizer_source: base\n", out="cut")["model.embed_tokens.weight"]
    whole = load_file(theirs.folder / "math/model.safetensors")["model.embed_tokens.weight"]
    return tokens <= len(made) < len(whole)


def _other_tokens(theirs: Theirs) -> bool:
    file = theirs.copy("code", "swapped") / "tokenizer.json"
    table = json.loads(file.read_text())
    vocabulary = table["model"]["vocab"]
    a, b = sorted(vocabulary, key=vocabulary.get)[40:42]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(table))
    text = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: math}, {model: NAME}]\n"
    made = [theirs.tensors(text.replace("NAME", name), out=f"with {name}") for name in ("code", "swapped")]
    return _same(*made)


def _in_use(theirs: Theirs) -> bool:
    theirs.tensors(LIST, "--out-shard-size", "10k", out="used")
    before = {name for name in theirs.files("used") if "-of-" in name}
    theirs.run(LIST, out="used")
    return len(before) > 1 and {*before, "model.safetensors", "model.safetensors.index.json"} <= theirs.files("used")


def _begins_again(theirs: Theirs) -> bool:
    """A shard that is there already is written anew."""
    theirs.tensors(LIST, out="again")
    file = theirs.folder / "again/model.safetensors"
    file.write_bytes(b"spoilt")
    return bool(theirs.tensors(LIST, out="again"))


def _pickle(theirs: Theirs) -> bool:
    folder = theirs.copy("math", "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return bool(theirs.tensors(LIST.replace("math", "pickled"), out="from pickle"))


def _runs_code(theirs: Theirs) -> bool:
    folder = theirs.copy("math", "owned")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoConfig": "own.Own"}, "model_type": "owned"})
    )
    (folder / "own.py").write_text(OWN_CODE)
    without = theirs.run(LIST.replace("math", "owned"), out="owned without").returncode
    theirs.run(LIST.replace("math", "owned"), "--trust-remote-code", out="owned with")
    return without == 1 and (theirs.folder / "ran").exists()


def _few_files(theirs: Theirs) -> bool:
    folder = theirs.copy("math", "with files")
    for name in ("LICENSE", "preprocessor_config.json", "chat_template.jinja"):
        (folder / name).write_text("{}")
    theirs.tensors(LIST.replace("math", "with files"), out="files")
    kept = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    return theirs.files("files") == {*kept, "chat_template.jinja"}


def _bytes(theirs: Theirs) -> bool:
    """No shard of several tensors is larger than so many bytes; with as many parameters most would be."""
    made = theirs.tensors(LIST, "--out-shard-size", "10k", out="shards")
    files = [load_file(file) for file in (theirs.folder / "shards").glob("*.safetensors")]
    sizes = [sum(t.nbytes for t in tensors.values()) for tensors in files if len(tensors) > 1]
    return bool(made) and bool(sizes) and max(sizes) <= 10_000


def _not_beside(theirs: Theirs) -> bool:
    (theirs.folder / "beside").mkdir()
    theirs.copy("math", "beside/near")
    done = theirs.run(LIST.replace("math", "near"), out="beside out", recipe="beside/r.yml")
    return done.returncode == 1 and "huggingface.co" in done.stderr


def _cpu(theirs: Theirs) -> bool:
    ask = "from mergekit.merge import MergeOptions; print(MergeOptions(cuda=False).device)"
    done = subprocess.run([str(theirs.tool.with_name("python")), "-c", ask], capture_output=True, text=True, check=True)
    return done.stdout.split() == ["cpu"]


CHECKS: dict[str, Callable[[Theirs], bool]] = {
    "All mistakes at once.": _first_mistake,
    "Misspelled names.": _silent_names,
    "Keys that appear twice": _last_key,
    "No `dtype`.": _promoted,
    "`linear` with a `base_model` that is not listed": _base_needs_weight,
    "Rows beyond the tokenizer.": _cut,
    "Tokenizers that differ.": _other_tokens,
    "Folders that are in use.": _in_use,
    "Interrupted merges": _begins_again,
    "Pickle": _pickle,
    "Code of models": _runs_code,
    "Files of the base.": _few_files,
    "Size of shards.": _bytes,
    "Paths.": _not_beside,
    "Device.": _cpu,
}


def items() -> list[str]:
    """The words in bold that the items of the page begin with."""
    part = PAGE.read_text(encoding="utf-8").partition(HEADING)[2].partition("\n## ")[0]
    return [re.sub(r"\s+", " ", words) for words in re.findall(r"^- \*\*(.+?)\*\*", part, re.M | re.S)]


def page(work: Path, tool: Path) -> Iterator[tuple[str, str]]:
    """(item, what is wrong with it, or an empty text), for each item of the page and each check."""
    listed = items()
    yield "from-mergekit.md", "" if listed else "there are no items"
    yield "from-mergekit.md", f"other items: {sorted({*listed} ^ {*CHECKS})}" if {*listed} ^ {*CHECKS} else ""
    _build(work)
    theirs = Theirs(tool.absolute(), work)
    for words, holds in CHECKS.items():
        try:
            yield words, "" if holds(theirs) else "does not hold"
        except AssertionError as error:
            yield words, f"does not hold: {error}"
