"""The recipe `images`: how it trains, evaluates and calibrates, and what it tells."""

import copy
import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fastentropy.recipes import images as recipe_module
from fastentropy.recipes.images import Images
from tests.recipes import image_networks
from tests.recipes.image_cases import SIZE, draw_images, write_parquet

CPU = torch.device("cpu")
ARRAYS = {"train": draw_images(60), "test": draw_images(21, seed=1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split, arrays in ARRAYS.items():
        write_parquet(folder / f"{split}.parquet", *arrays)
    return folder


def make(folder, model="Small", **options):
    given = {"model": f"{image_networks.__name__}:{model}", "image_size": SIZE, "batch_size": 8, "precision": "float32"}
    return Images(CPU, data=str(folder), **{**given, **options})


def train(recipe, epochs=1):
    """Train the network of a recipe with a fixed seed. Return it and the loss of each batch."""
    torch.manual_seed(3)
    model = recipe.build_model().train()
    losses = [float(step.loss) for step in recipe.train(model, epochs)]
    return model.eval(), losses


def same(model, other):
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def test_training_is_reproducible_and_learns(folder):
    recipe = make(folder, images_per_epoch=32)
    (model, losses), (again, other_losses) = train(recipe, 12), train(recipe, 12)
    assert losses == other_losses
    assert same(model, again)
    assert recipe.evaluate(model, "test") > 0.6


@pytest.mark.parametrize(("images_per_epoch", "trained", "measured"), [(None, 48, 54), (32, 32, 32), (1000, 48, 54)])
def test_progress_counts_images(images_per_epoch, trained, measured, folder):
    recipe = make(folder, images_per_epoch=images_per_epoch)
    model = recipe.build_model()
    steps = list(recipe.train(model.train(), 2))
    assert [(step.done, step.total) for step in steps] == [(8 * n, 2 * trained) for n in range(1, len(steps) + 1)]
    assert len(steps) == 2 * trained // 8
    seen = []
    recipe.evaluate(model.eval(), "test", seen.append)
    assert seen[-1][:2] == (21, 21)
    calibrated = list(recipe.calibrate(model))
    assert len(calibrated) == recipe.calibration_batches
    assert calibrated[-1][:2] == (measured, measured)


def test_accuracy_is_the_share_of_right_answers(folder):
    recipe = make(folder)
    pixels, labels = ARRAYS["test"]
    known = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    answers = torch.tensor(labels)
    answers[::3] = (answers[::3] + 1) % 3  # every third is wrong

    def model(images):
        distance = (images[:, None] - ((known - mean) / std)[None]).abs().amax((2, 3, 4))
        assert distance.min(1).values.max() < 1e-5
        return torch.eye(3)[answers[distance.argmin(1)]]

    assert recipe.evaluate(model, "test") == 14 / 21
    torch.testing.assert_close(recipe.example_inputs()[0], (known[:16] - mean) / std)


def test_images_that_do_not_fit_the_cache_give_the_same_results(folder):
    cached, decoded = make(folder), make(folder, cache_gb=0.0)
    assert "decoded in memory" in cached.notes[1]
    assert "decoded for each batch, as they take more than --cache-gb 0" in decoded.notes[1]
    (model, losses), (other, other_losses) = train(cached, 2), train(decoded, 2)
    assert losses == other_losses
    assert same(model, other)
    assert torch.equal(cached.example_inputs()[0], decoded.example_inputs()[0])
    for split in ("validation", "test"):
        assert cached.evaluate(model, split) == decoded.evaluate(model, split)


def test_decoding_reports_its_progress(folder):
    seen = []
    make(folder, report=seen.append)
    assert [progress[:2] for progress in seen] == [(54, 81), (75, 81), (81, 81)]


def test_batch_norm_follows_short_schedules(folder):
    recipe, seen = make(folder), []
    model = recipe.build_model().train()
    model.stem[1].register_forward_pre_hook(lambda module, inputs: seen.append(module.momentum))
    list(recipe.train(model, 1))
    assert set(seen) == {0.1}
    assert model.stem[1].momentum == 0.01


def test_adamw_moves_each_weight_by_the_learning_rate(folder):
    recipe = make(folder, optimizer="adamw", learning_rate=0.01, batch_size=64)  # one step, at half of the highest rate
    torch.manual_seed(3)
    model = recipe.build_model().train()
    before = {name: value.clone() for name, value in model.named_parameters()}
    list(recipe.train(model, 1))
    for name, value in model.named_parameters():
        decayed = before[name] * (1 - 0.005 * 0.05 * (value.ndim > 1))
        moved = (value - decayed).abs()
        assert moved.max() <= 0.005 + 1e-6
        assert moved.median() > 0.0049 or name == "stem.0.bias"  # batch norm removes this bias, so its gradient is rounding


def test_moving_average_of_the_weights(folder):
    recipe, seen = make(folder, ema=0.6), []
    torch.manual_seed(3)
    model = recipe.build_model().train()
    for _ in recipe.train(model, 1):
        seen.append({name: value.double().clone() for name, value in model.state_dict().items()})
    expected = seen[0]
    for state in seen[1:]:
        expected = {name: 0.6 * expected[name] + 0.4 * state[name] for name in expected}
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert not same(model, train(make(folder))[0])


def test_bfloat16_is_for_the_operators_only(folder):
    recipe, seen = make(folder, precision="bfloat16"), []
    model = recipe.build_model().train()
    model.fc.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    list(recipe.train(model, 1))
    assert set(seen) == {torch.bfloat16}
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32, torch.int64}
    assert recipe.example_inputs()[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("speeds", "chosen"), [((10.0, 11.0), "bfloat16"), ((10.0, 10.2), "float32"), ((10.0, 5.0), "float32")]
)
def test_precision_is_measured_and_said(speeds, chosen, folder, monkeypatch):
    times = iter([1 / speed for speed in speeds for _ in range(2)])
    monkeypatch.setattr(recipe_module, "measure_seconds", lambda step: 8 * next(times))
    recipe = make(folder, precision=None)
    assert recipe.chosen == {"precision": chosen}
    assert (
        recipe.notes[-1]
        == f"trains in {chosen} (measured: float32 {speeds[0]:.0f} images/s, bfloat16 {speeds[1]:.0f} images/s)"
    )


def test_compiled_training(folder, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=(counter := CompileCounter())))
    (model, losses), (compiled, other_losses) = train(make(folder)), train(make(folder, compile=True))
    assert counter.frame_count == 1
    assert losses == other_losses
    assert same(model, compiled)


def test_network_learns_from_the_teacher(folder):
    recipe, plain = make(folder, distill=2.0, label_smoothing=0.0), make(folder, label_smoothing=0.0)
    assert train(recipe)[1] == train(plain)[1]  # the dense network has no teacher
    recipe.teacher = plain.teacher = teacher = train(plain, 2)[0]
    before = copy.deepcopy(teacher)
    seen = []
    teacher.register_forward_hook(lambda module, inputs, output: seen.append((module.training, output)))
    assert train(plain)[1] == train(make(folder, label_smoothing=0.0))[1]
    assert not seen  # without --distill
    _, losses = train(recipe)
    assert len(seen) == len(losses)
    assert not any(training or taught.requires_grad for training, taught in seen)
    assert same(teacher, before)
    assert losses != train(plain)[1]


def test_calls_that_cannot_be_isolated_are_protected(folder):
    recipe = make(folder, model="Looped")
    assert set(recipe.protected) == {"gelu", "gelu:1", "relu", "relu:1"}
    assert any("cannot be isolated: " in note for note in recipe.notes)
