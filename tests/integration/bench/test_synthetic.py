"""The synthetic bench: its rounding by hand, its policy against transformers', its arms' mismatch, its report."""

import copy
import json
import math
import random

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("pandas")

from fp16_patch.mismatch.statistics.summary import MismatchStats
from integration.bench import synthetic
from integration.bench.rounded_policy import Cache, RoundedPolicy
from integration.bench.rounding import Precision, operand, product, round_mantissa
from integration.bench.synthetic import Settings, arms
from integration.cpu.tiny_model import character_model, character_tokenizer
from integration.demo.task import problems

INF, NAN = math.inf, math.nan
LARGEST, SMALLEST = torch.finfo(torch.float32).max, 2.0**-149
TINY = Settings(steps=2, window=2, problems=4, problems_a_step=2, samples_a_problem=4, max_response=6, hidden_size=32)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    return character_model(character_tokenizer(), hidden_size=TINY.hidden_size, layers=TINY.layers, seed=0)


# 2 bits: 1, 1.25, 1.5, 1.75 and their multiples by powers of two.
@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (0.0, 0.0),
        (1.0, 1.0),
        (1.75, 1.75),
        (1.1, 1.0),
        (1.2, 1.25),
        (1.125, 1.0),  # a tie, to the even mantissa 00 rather than 01
        (1.375, 1.5),  # a tie, to 10 rather than 01
        (1.625, 1.5),
        (1.875, 2.0),  # a tie, and the carry is the next power of two
        (1.9, 2.0),
        (0.1, 0.09375),
        (5.5, 6.0),  # a tie, to 1.5 · 4 rather than 1.25 · 4
        (1000.0, 1024.0),
        (LARGEST, INF),
        (SMALLEST, 0.0),
        (INF, INF),
    ],
)
def test_two_bits_by_hand(value, rounded):
    signed = round_mantissa(torch.tensor([value, -value]), 2)
    assert signed.tolist() == [rounded, -rounded]
    assert signed.signbit().tolist() == [False, True]


def test_nan_stays_nan_whatever_its_bits():
    patterns = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32)
    assert round_mantissa(patterns.view(torch.float32), 2).isnan().all()


@pytest.mark.parametrize(("bits", "dtype"), [(7, torch.bfloat16), (10, torch.float16)])
def test_it_is_the_rounding_of_the_real_dtypes(bits, dtype):
    values = torch.cat([torch.randn(10_000), torch.linspace(0.5, 4, 4097)])
    values = values[values.abs() > 1e-3]  # below, FP16 is subnormal
    assert torch.equal(round_mantissa(values, bits), values.to(dtype).float())


@pytest.mark.parametrize(("values", "bits"), [(torch.ones(1).double(), 2), (torch.ones(1), 0), (torch.ones(1), 23)])
def test_what_cannot_be_rounded_is_refused(values, bits):
    with pytest.raises(ValueError, match="expected float32 and 1 to 22 bits"):
        round_mantissa(values, bits)


def test_the_other_rounding_is_as_coarse_and_another():
    values = torch.linspace(0, 8, 100_001).exp2()
    here, there = (precision.rounded(values) for precision in (Precision(1), Precision(1, synthetic.OTHER_PHASE)))
    errors = [((rounded - values) / values).square().mean().sqrt() for rounded in (here, there)]
    torch.testing.assert_close(*errors, rtol=1e-2, atol=0.0)
    assert not torch.isclose(here, there, rtol=1e-2).any()
    assert torch.equal(Precision(1, 2.0).rounded(values), here)


def test_a_product_rounds_its_operands_in_the_forward_and_in_the_backward():
    low = Precision(2)
    left, right, gradient = (torch.randn(shape, requires_grad=True) for shape in ((3, 5), (5, 4), (3, 4)))
    result = product(operand(left, low), operand(right, low), low)
    result.backward(gradient.detach())
    rounded_left, rounded_right, rounded_gradient = (low.rounded(part.detach()) for part in (left, right, gradient))
    assert torch.equal(result, rounded_left @ rounded_right)
    assert torch.equal(left.grad, rounded_gradient @ rounded_right.mT)
    assert torch.equal(right.grad, rounded_left.mT @ rounded_gradient)


@pytest.mark.parametrize("precision", [None, Precision(1)])
def test_without_a_gradient_the_function_is_the_same(model, precision):
    tokens = torch.randint(2, 90, (2, 9))
    with torch.no_grad():
        without = RoundedPolicy(model, precision).logits(tokens)
    assert torch.equal(without, RoundedPolicy(model, precision).logits(tokens))


def test_unrounded_it_is_the_model(model):
    tokens = torch.randint(2, 90, (3, 11))
    ours, theirs = RoundedPolicy(model, None).logits(tokens), model(tokens).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    cache, policy = Cache(), RoundedPolicy(model, None)
    pieces = torch.cat([policy.logits(part, cache) for part in (tokens[:, :6], tokens[:, 6:7], tokens[:, 7:])], 1)
    torch.testing.assert_close(pieces, theirs, atol=1e-5, rtol=1e-4)


def test_unrounded_its_gradients_are_the_models(model):
    tokens = torch.randint(2, 90, (3, 11))
    gradients = []
    for policy in (RoundedPolicy(model, None).logits, lambda tokens: model(tokens).logits):
        model.zero_grad()
        policy(tokens).logsumexp(-1).mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("fp32", 0, 1e-5),
        ("same rounding", 0, 1e-5),
        ("other rounding", 1e-2, INF),
        ("fp32 learner", 1e-2, INF),
    ],
)
def test_one_step_of_an_arm_has_the_mismatch_it_is_for(model, name, least, most):
    arm, trained = arms(1)[name], copy.deepcopy(model)
    asked = [problem for problem in problems(2, 0) for _ in range(TINY.samples_a_problem)]
    generator = torch.Generator().manual_seed(0)
    rollouts = synthetic.sample(RoundedPolicy(trained, arm.sampler), character_tokenizer(), asked, TINY, generator)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
    learner = synthetic.update(trained, optimizer, rollouts, arm.learner, TINY)
    mismatch = MismatchStats.from_log_probs(rollouts.log_probs, learner, rollouts.mask).metrics("")
    assert least <= mismatch["mean_abs"] <= most
    assert mismatch["nonfinite_tokens"] == 0


def test_a_response_ends_with_its_end_token(model):
    tokenizer, generator = character_tokenizer(), torch.Generator().manual_seed(0)
    trained = copy.deepcopy(model)
    with torch.no_grad():
        trained.model.embed_tokens.weight[tokenizer.eos_token_id] *= 8
    asked = problems(32, 0)
    rollouts = synthetic.sample(RoundedPolicy(trained, None), tokenizer, asked, TINY, generator)
    ends = rollouts.tokens == tokenizer.eos_token_id
    before = (ends.cumsum(1) - ends.long()) == 0
    assert ends.any()
    assert torch.equal(rollouts.mask, before)


def test_the_sampler_is_the_same_wherever_it_is_rounded():
    reference, *rounded = arms(2).values()
    assert reference == synthetic.Arm(None, None)
    assert {arm.sampler for arm in rounded} == {Precision(2)}
    assert len({arm.learner for arm in rounded}) == len(rounded)


def test_the_summary_is_over_seeds():
    def curves(reward, d):
        return {"reward": reward, "mean_abs": d, "seq_mean_abs": d, "k3": d}

    rising = synthetic.figures(curves([0.0, 0.2, 0.4, 0.8], [0.0] * 4), window=2)
    falling = synthetic.figures(curves([0.2, 0.4, 0.6, 0.0], [1.0, 2.0, 3.0, 4.0]), window=2)
    assert rising["start_reward"] == pytest.approx(0.1)
    assert rising["peak_reward"] == rising["final_reward"] == pytest.approx(0.6)
    assert falling["fall"] == pytest.approx(0.2)
    assert falling["mean_abs"] == 2.5
    runs = [figures | {"learner_reward": 0.5} for figures in (rising, falling)]
    summary = synthetic.summarize({"same rounding": {"0": runs[0], "1": runs[0]}, "x": {"0": runs[0], "1": runs[1]}})
    assert summary["x"]["final_reward"] == pytest.approx({"mean": 0.45, "min": 0.3, "max": 0.6})
    assert summary["x"]["final_below_same"] == pytest.approx({"mean": 0.15, "min": 0.0, "max": 0.3})


def test_it_measures_every_arm_and_repeats_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic.make_model, "train", lambda *_: [])
    measured = synthetic.measure(tmp_path, [3], TINY)
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured
    assert measured["label"] == "synthetic"
    assert measured["seeds"] == [3]
    assert list(measured["arms"]) == list(measured["summary"]) == list(arms(TINY.bits))
    for runs in measured["arms"].values():
        assert list(runs) == ["3"]
        assert {len(curve) for run in runs.values() for curve in run["curves"].values()} == {TINY.steps}
    monkeypatch.setattr(synthetic, "run", lambda *_: pytest.fail("ran again"))
    assert synthetic.measure(tmp_path, [3], TINY) == measured


def test_problems_and_samples_are_those_of_the_seed(tmp_path, model):
    model.save_pretrained(tmp_path)
    state = random.getstate()
    curves = [
        synthetic.run(tmp_path, arms(1)["same rounding"], TINY, 0, lambda reward: None)["curves"] for _ in range(2)
    ]
    assert curves[0] == curves[1]
    assert random.getstate() == state
