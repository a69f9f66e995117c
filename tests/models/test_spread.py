"""Weights of which each process has a part (FSDP2, tensor parallelism) are refused by name, before localisation.

Two real processes: in one alone a DTensor is whole.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
from conftest import HANGS, with_same_threads

WORKER = """
    import sys, torch
    from conftest import LLAMA_DOWN, ONE_TOKEN, make_llama, make_tokenizer, tiny_hparams
    from kne_easyedit import apply_kne_to_model, attribute, compute_edit, find_ensemble
    from kne_easyedit.localization import localizer
    from torch.distributed.device_mesh import init_device_mesh

    rank, folder = int(sys.argv[1]), sys.argv[2]
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    tokenizer, request = make_tokenizer(), {"prompt": ONE_TOKEN[0], "target_new": ONE_TOKEN[1]}
    for kind in ("whole", "fully_shard", "tensor_parallel"):
        model = make_llama()
        if kind == "fully_shard":
            from torch.distributed.fsdp import fully_shard
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        elif kind == "tensor_parallel":
            from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
            plan = {"up_proj": ColwiseParallel(), "gate_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
            for layer in model.model.layers:
                parallelize_module(layer.mlp, mesh, plan)
        if kind != "whole":
            localizer.attribute_facts = localizer.ScoreCache = None  # nothing may be localised
        ways = {
            "apply": lambda: apply_kne_to_model(model, tokenizer, [request], tiny_hparams()),
            "compute": lambda: compute_edit(model, tokenizer, [request], tiny_hparams()),
            "localise": lambda: find_ensemble(model, tokenizer, [request], tiny_hparams()),
            "attribute": lambda: attribute(model, tokenizer, *ONE_TOKEN, LLAMA_DOWN, 2),
        }
        for name, way in ways.items():
            try:
                way()
                print(kind, name, "done")
            except ValueError as error:
                print(kind, name, "refused:", error)
    torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each process says: (kind of model, way to use it) -> text."""
    command = [sys.executable, "-c", textwrap.dedent(WORKER)]
    folder = str(tmp_path_factory.mktemp("group"))
    workers = [
        subprocess.Popen([*command, str(rank), folder], env=with_same_threads(), stdout=-1, stderr=-1, text=True)
        for rank in (0, 1)
    ]
    found = []
    for worker in workers:
        out, err = worker.communicate(timeout=HANGS)
        assert worker.returncode == 0, err
        lines = [line.split(" ", 2) for line in out.splitlines()]
        found.append({(kind, way): text for kind, way, text in lines})
    return found


WAYS = ("apply", "compute", "localise", "attribute")


@pytest.mark.parametrize("kind", ["fully_shard", "tensor_parallel"])
@pytest.mark.parametrize("way", WAYS)
def test_refused_in_every_process(kind, way, said):
    for texts in said:
        assert texts[kind, way].startswith("refused: ") and "spread over processes" in texts[kind, way]
        assert "DTensor" in texts[kind, way] and "load the whole model into one process" in texts[kind, way]
        assert "model_parallel: true" in texts[kind, way]


def test_whole_models_are_taken(said):
    """Converse: two processes, each with the whole model."""
    assert [texts["whole", way] for texts in said for way in WAYS] == ["done"] * 8
