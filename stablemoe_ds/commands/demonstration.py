"""The whole story on one machine: Python's own source in, a two-stage model and its routing table out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from importlib.resources import files as package_files
from pathlib import Path

from stablemoe_ds.answers import answer, descriptor
from stablemoe_ds.config.load import load_run
from stablemoe_ds.config.rules import check
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.data.corpus import corpus_file
from stablemoe_ds.data.prepare import prepare
from stablemoe_ds.data.text_files import split_files
from stablemoe_ds.data.tokenizer import Tokenizer, train_tokenizer
from stablemoe_ds.distributed.environment import free_port
from stablemoe_ds.errors import UserError

SKIPPED = ("site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "ensurepip")
PROMPT = "class Node:\n    def __init__(self, name, parent=None):\n"


def demo(overrides: list[str]) -> int:
    """Make data, train two stages under the deepspeed launcher, and print the results. Returns an exit status."""
    began = time.perf_counter()
    processes = _processes()
    settings = [*overrides, f"parallel.expert={processes}"]
    path = _configuration()
    run = load_run(path, settings)
    check(run, processes)
    folder = Path(run.directory)
    _prepare_data(run)
    answer(f"\nTraining with {processes} process(es) through DeepSpeed; configuration {path}\n")
    code = _launch(path, settings, processes)
    if code:
        return code

    from stablemoe_ds.checkpoint.reader import Checkpoint
    from stablemoe_ds.evaluation.on_checkpoint import continue_prompts
    from stablemoe_ds.evaluation.report_text import render_text
    from stablemoe_ds.evaluation.run_report import run_report

    checkpoint = Checkpoint.open(folder)
    if checkpoint.progress.step < run.schedule.steps:
        answer("The demo was stopped; the same command continues it.")
        return 130
    report = run_report(checkpoint)
    answer(render_text(report))
    answer("A sample, drawn with top-p 0.9:\n")
    (text,) = continue_prompts(str(folder), [PROMPT], max_new_tokens=80, temperature=0.8, top_p=0.9, seed=1)
    answer("\n".join("    " + line for line in (PROMPT + text).splitlines()))
    ppl, exported = report["valid_ppl"], _export(folder)
    answer(f"""
Validation perplexity   stage 1: {ppl["stage1"]:.2f} (learned router), {ppl["stage1_distilled"]:.2f} (distilled)
                        end: {ppl["final"]:.2f}
Changed expert after the switch: {report["changed_after_switch"]:.2%} of the probe tokens
Speed                   {report["tokens_per_second"]:,.0f} tokens/s; {time.perf_counter() - began:.0f} s in all
Checkpoint              {checkpoint.path}
Routing table           {folder / "routing_table.safetensors"}
Log                     {folder / "metrics.jsonl"} (and TensorBoard events in {folder / "tensorboard"})
Report                  {folder / "report.json"}
Picture                 {folder / "report.png"}
For transformers        {exported}""")
    return 0


def _processes() -> int:
    """Two on a CPU or on two GPUs and more; one on a single GPU, which two processes cannot share."""
    import torch

    return 1 if torch.cuda.is_available() and torch.cuda.device_count() == 1 else 2


def _configuration() -> Path:
    """ds_configs/demo.yaml of the checkout this package was installed from, or of the working directory."""
    for root in (Path(str(package_files("stablemoe_ds"))).parent, Path.cwd()):
        path = root / "ds_configs" / "demo.yaml"
        if path.is_file():
            return path
    raise UserError("ds_configs/demo.yaml not found: run the demo from a checkout of the project")


def _prepare_data(run: RunConfig) -> None:
    """Tokenizer and corpora from Python's standard library, unless an earlier demo has made them."""
    if run.data.tokenizer is None or not run.data.valid:
        raise UserError("the demo needs data.tokenizer and data.valid: where it may write them")
    target, corpora = Path(run.data.tokenizer), {"train": run.data.train[0].path, "valid": run.data.valid[0].path}
    if target.exists() and all(corpus_file(prefix, "json").exists() for prefix in corpora.values()):
        answer(f"using the data in {target.parent}")
        return
    library = Path(sysconfig.get_paths()["stdlib"])
    found = [path for path in library.rglob("*.py") if not set(path.relative_to(library).parts[:-1]) & set(SKIPPED)]
    train, valid = split_files([path for path in found if path.stat().st_size], 0.05, seed=run.seed)
    answer(f"text: {len(train)} + {len(valid)} files of {library}")
    tokenizer: Tokenizer = train_tokenizer(
        train, target, run.model.vocab_size or 4096, "bpe", threads=os.cpu_count() or 1
    )
    for name, part in (("train", train), ("valid", valid)):
        info = prepare(part, tokenizer, corpora[name], workers=os.cpu_count() or 1, documents="file")
        answer(f"{name}: {info.documents:,} documents, {info.tokens:,} tokens, {info.words:,} words")


def _export(run_dir: Path) -> str:
    """Write the model as a folder for transformers, in place of an earlier demo's; says where it is, or why not."""
    from stablemoe_ds.export.exported_folder import export

    output = run_dir / "huggingface"
    shutil.rmtree(output, ignore_errors=True)
    try:
        export(run_dir, output)
    except UserError as error:  # transformers is an extra, and the demo is done without it
        return f"not written: {error}"
    return f'{output}; AutoModelForCausalLM.from_pretrained("{output}", trust_remote_code=True)'


def _launch(path: Path, settings: list[str], processes: int) -> int:
    """``stablemoe train`` under the deepspeed launcher; returns its exit status."""
    port = str(free_port())
    launcher = ["deepspeed.launcher.runner", "--quiet", "--no_local_rank", "--num_gpus", str(processes)]
    launcher += ["--master_port", port]
    command = [sys.executable, "-m", *launcher, "--module", "stablemoe_ds", "train", str(path), *settings]
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)), **os.environ}
    return subprocess.run(command, env=environment, stdout=descriptor(), check=False).returncode
