"""The kit that tests losses: an honest loss passes, and every kind of planted fault is found and named."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from losses import Criterion
from losses.conformance import TESTS, check, of_criterion
from losses.conformance.problem import Loss
from matchers import FocalCost, Mixed, SoftmaxCost
from tests.losses.loss_cases import EXPONENTS, LOSSES
from tools import check_loss

ROOT = Path(__file__).parents[2]


def pairs(boxes, targets):
    """(query, target) of each image, by L1 distance."""
    for b, target in enumerate(targets):
        cost = torch.cdist(boxes[b].detach().double(), target["boxes"].double(), p=1)
        yield [torch.as_tensor(index) for index in linear_sum_assignment(cost.numpy())]


def honest(logits, boxes, targets, num_targets=None, gamma=2.0, divide: Callable | None = None, entry=None):
    """Focal BCE of all entries and L1 of matched boxes, divided by the number of targets."""
    logits, boxes = logits if logits.dtype == torch.float64 else logits.float(), boxes.to(torch.float64)
    truth, distance = torch.zeros_like(logits), boxes.new_zeros(())
    for b, (query, target) in enumerate(pairs(boxes, targets)):
        truth[b, query, targets[b]["labels"][target]] = 1
        distance = distance + (boxes[b, query] - targets[b]["boxes"][target]).abs().sum()
    entries = (entry or bce)(logits, truth, gamma)
    own = sum(len(target["labels"]) for target in targets)
    count = max(1, own if num_targets is None else num_targets)
    if divide is not None:
        return entries.sum() / divide(logits, own) + distance / count
    return (entries.sum() + distance) / count


def bce(logits, truth, gamma):
    modulation = ((logits.sigmoid() - truth).abs().clamp(min=1e-9)) ** gamma
    return modulation * F.binary_cross_entropy_with_logits(logits, truth, reduction="none")


def variant(entry):
    """The honest loss with another loss of each entry."""
    return lambda logits, boxes, targets, num_targets=None: honest(logits, boxes, targets, num_targets, entry=entry)


class DoubledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def plain_logarithm(logits, truth, gamma):
    score = logits.sigmoid()
    return -truth * score.log() - (1 - truth) * score**2 * (1 - score).log()


def wrong_gradient(logits, truth, gamma):
    return bce(DoubledGradient.apply(logits), truth, gamma)


def matched_without_gradient(logits, truth, gamma):
    return bce(torch.where(truth == 1, logits.detach(), logits), truth, gamma)


def in_the_given_precision(logits, boxes, targets, num_targets=None):
    truth = torch.zeros_like(logits)
    for b, (query, target) in enumerate(pairs(boxes, targets)):
        truth[b, query, targets[b]["labels"][target]] = 1
    return bce(logits, truth, 2.0).sum() / max(1, num_targets or sum(len(t["labels"]) for t in targets))


def across_queries(logits, truth, gamma):
    return bce(logits - logits.mean(1, keepdim=True), truth, gamma)


def crowd_leaks(logits, truth, gamma):
    """What comes after a crowded image loses its first query."""
    crowded = torch.cat((torch.zeros(1), (truth.flatten(1).sum(1) > 5).cumsum(0)[:-1])).bool()
    factor = torch.ones_like(logits)
    factor[crowded, 0] = 0
    return factor * bce(logits, truth, gamma)


def first_target_counts_double(logits, boxes, targets, num_targets=None):
    first = [t["boxes"][:1] for t in targets]
    extra = sum((b[:, None] - f).abs().sum(-1).amin(0).sum() for b, f in zip(boxes, first, strict=True))
    count = max(1, num_targets or sum(len(t["labels"]) for t in targets))
    return honest(logits, boxes, targets, num_targets) + extra / count


def divides_twice(logits, boxes, targets, num_targets=None):
    own = max(1, sum(len(t["labels"]) for t in targets))
    return honest(logits, boxes, targets, num_targets) * (1 if num_targets is None else own / num_targets)


def modifies(logits, boxes, targets, num_targets=None):
    targets[0]["boxes"].clamp_(max=0.5)
    return honest(logits, boxes, targets, num_targets)


def all_with_all(logits, boxes, targets, num_targets=None):
    everything = torch.cat([t["boxes"] for t in targets])
    waste = (everything[:, None, None] - everything[None, :, None]).expand(-1, -1, 32, -1).abs().sum()
    return honest(logits, boxes, targets, num_targets) + 0 * waste


def flag_that_does_nothing(logits, boxes, targets, num_targets=None, ia_bce=True):
    return honest(logits, boxes, targets, num_targets)


def test_an_honest_loss_passes():
    report = check(honest, fields={"gamma": [0.0, 0.5, 1.0, 2.0]})
    assert not report.faults, str(report)
    assert {f.test for f in report.findings if f.verdict == "note"} <= {"dtypes"}
    assert json.loads(json.dumps(report.as_json()))["faults"] == 0


@pytest.mark.parametrize(
    ("loss", "test", "words"),
    [
        (variant(plain_logarithm), "finite", "logit of"),
        (variant(wrong_gradient), "gradients", "unmatched logits are off by"),
        (variant(matched_without_gradient), "gradients", "takes no gradient"),
        (in_the_given_precision, "dtypes", "Given bfloat16, .* off its value"),
        (variant(across_queries), "padding", "changes the gradients"),
        (variant(crowd_leaks), "images", "after one of"),
        (first_target_counts_double, "order", "order of the targets"),
        (divides_twice, "splitting", "add up to"),
        (modifies, "order", "modifies"),
        (flag_that_does_nothing, "fields", "ia_bce = True, False"),
        (all_with_all, "cost", "more than in proportion"),
    ],
)
def test_planted_faults_are_found(loss, test, words):
    report = check(loss, fields={"ia_bce": [True, False]} if test == "fields" else None)
    sentences = [finding.sentence for finding in report.findings if finding.test == test and finding.verdict != "ok"]
    assert any(re.search(words, sentence) for sentence in sentences), str(report)


@pytest.mark.parametrize(
    ("divide", "divisor"),
    [
        (lambda logits, own: 1, "nothing"),
        (lambda logits, own: max(own, 1), "the number of targets"),
        (lambda logits, own: len(logits), "the number of images"),
        (lambda logits, own: logits.shape[1], "the number of queries of an image"),
        (lambda logits, own: logits.shape[0] * logits.shape[1], "the number of queries of all images"),
        (lambda logits, own: logits.shape[1] ** 2, None),
    ],
)
def test_the_divisor_is_told(divide, divisor):
    findings = TESTS["divisor"](Loss(functools.partial(honest, divide=divide), {}, 4, False))
    assert [finding.numbers["divisor"] for finding in findings] == [divisor, "the number of targets"]


def test_the_logit_is_told():
    (first, *_) = TESTS["finite"](Loss(variant(plain_logarithm), {}, 4, False))
    assert first.numbers["entry"] == "matched"
    assert first.numbers["logit"] == pytest.approx(16.7, abs=0.2), "where a score rounds to 1 in float32"


def broken(logits, boxes, targets):
    raise IndexError("no such class")


def test_a_loss_that_computes_in_float32_inside_is_not_called_wrong():
    def rounding(logits, boxes, targets, num_targets=None):
        return honest(logits.float(), boxes, targets, num_targets).double()

    findings = [finding for finding in check(rounding).findings if finding.test == "gradients"]
    assert [finding.verdict for finding in findings] == ["note"]
    assert "does not compute in float64" in findings[0].sentence


def test_what_it_raises_is_a_finding():
    report = check(broken)
    assert len(report.faults) == len(TESTS) - 1, "no fields were given to test"
    assert "IndexError here: no such class" in str(report)


def exponents(loss):
    return {field.name: EXPONENTS for field in dataclasses.fields(loss) if field.name in ("gamma", "beta")}


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_every_loss_of_the_index_passes(loss):
    matcher = Mixed(candidates=2, cost=SoftmaxCost() if loss.no_object else FocalCost())
    criterion = Criterion(classification=loss, matcher=matcher, prime_sample_tau=1.5)
    report = check(of_criterion(criterion), fields=exponents(loss), no_object=loss.no_object)
    assert not report.faults, str(report)


@pytest.mark.parametrize("form", ["authors_focal", "lw_detr", "mr_detr", "relation_detr", "sam3"])
def test_every_published_form_passes(form):
    arguments = ["--cfg", f"{ROOT}/configs/align_dino.yaml", f"base={ROOT}/configs/losses/{form}.yaml"]
    assert check_loss.main(arguments) == 0


def test_the_command_reports_in_sentences_and_json(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text("def loss(logits, boxes, targets, flag=True):\n    return logits.sum()\n")
    monkeypatch.syspath_prepend(tmp_path)
    fields = ["--fields", '{"flag": [true, false]}', "--json", str(tmp_path / "report.json")]
    assert check_loss.main(["mine:loss", *fields]) == 1
    assert "flag = True, False all give the same loss" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["loss"] == "mine:loss"
    assert {finding["test"] for finding in report["findings"]} == TESTS.keys()
    assert check_loss.main(["mine:loss", *fields]) == 1
    (tmp_path / "report.json").write_text('{"loss": 1}')
    assert check_loss.main(["mine:loss", *fields]) == 2
    assert "report.json: is there already and no report of this command" in capsys.readouterr().err
    assert (tmp_path / "report.json").read_text() == '{"loss": 1}'


@pytest.mark.parametrize("name", ["nowhere:loss", "json:nothing", "json"])
def test_what_cannot_be_found_is_one_sentence(name, capsys):
    assert check_loss.main([name]) == 2
    assert capsys.readouterr().err.startswith(f"error: {name}: the module ")
