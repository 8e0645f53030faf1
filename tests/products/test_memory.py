"""What the closed form of the softmax keeps: no graph, and no more than the logits."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

import fisherfn as ff
from cases import normal
from fisherfn.batch import Batch
from fisherfn.core import trees
from fisherfn.estimators.observe import Labels
from fisherfn.estimators.observer import Observer
from fisherfn.estimators.products import output
from fisherfn.testing import assert_close

PROGRAM = """
import json, torch
import fisherfn as ff
from fisherfn.estimators.observe import Labels
from fisherfn.estimators.observer import Observer
from fisherfn.estimators.products.output import OutputFisher

def peak():  # that of this process: ru_maxrss begins with its parent's
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

torch.set_num_threads(1)
rows, classes = 512, 49_152
likelihood, labels = ff.likelihoods.categorical(), Labels("exact", 1, "example")
logits, tangents = torch.ones(rows, classes), torch.ones(rows, classes)
watch = Observer("test", likelihood, ff.Batch(logits), None, rows, normalised=True)
likelihood.fisher_mv(logits[:1], tangents[:1])
before = peak()
observed = watch.observe(logits, ("example",), 0, rows, targets_count=False)["example"]
found = OutputFisher(observed, labels)(tangents)
print(json.dumps((peak() - before) / (4 * rows * classes)))
"""


def observer(logits: torch.Tensor, mask: torch.Tensor | None = None) -> output.OutputFisher:
    likelihood, labels = ff.likelihoods.categorical(), Labels("exact", 1, "example")
    batch = Batch(logits, mask=mask)
    watch = Observer("test", likelihood, batch, None, len(logits), normalised=True)
    observed = watch.observe(logits, ("example",), 0, len(logits), targets_count=False)
    return output.OutputFisher(observed["example"], labels)


def test_rows_in_blocks_give_what_all_rows_give() -> None:
    logits, tangents = normal(7, 3, 50_001), normal(7, 3, 50_001, seed=1)
    mask = torch.ones(7, 3, dtype=torch.bool)
    mask[2, 1] = False
    for given in (None, mask):
        blocks = observer(logits, given)
        assert output._rows(blocks._observed, tangents) is not None
        got = blocks(tangents)
        p = logits.softmax(-1)
        want = p * (tangents - (p * tangents).sum(-1, keepdim=True)) / 7
        if given is not None:
            want = torch.where(given.unsqueeze(-1), want, 0.0)
        assert_close(got, want, rtol=1e-9)


def test_no_graph_goes_through_the_loss() -> None:
    found = observer(normal(3, 5))(normal(3, 5, seed=1))
    assert all(not t.requires_grad for t in trees.leaves(found))


def test_the_closed_form_at_a_vocabulary_of_49k_makes_one_more_tensor_like_the_logits() -> None:
    """Three in all: the logits, their tangent, and the cotangent."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    # pages and small buffers come on top
    assert 0.9 < json.loads(done.stdout) < 1.5
