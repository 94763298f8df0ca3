"""Model-level metrics against closed forms; the record, its check and its resumption."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from membench import diverge, overlap
from membench.contract import silent
from membench.data.imageset import Dataset
from membench.diffusion.targets import ClosedFormTarget, OracleTarget
from membench.errors import MembenchError
from membench.lab import Lab
from membench.metrics import divergence
from membench.registry import Registry
from membench.specs import DescriptorChoice, Sampling
from membench.store import Store


def closed_form(dataset: Dataset, kernel: float) -> ClosedFormTarget:
    """The density of the kernels round the members."""
    abar = OracleTarget(dataset, 0.5).abar
    return ClosedFormTarget(dataset.members.images, abar, kernel=kernel)


def mixture(points: np.ndarray, centres: np.ndarray, width: float) -> np.ndarray:
    """log (1/N) sum_i Normal(x; c_i, width^2 I) by scipy."""
    size = points.shape[1]
    each = [multivariate_normal(c, width**2 * np.eye(size)).logpdf(points) for c in centres]
    return logsumexp(np.reshape(each, (len(centres), -1)), axis=0) - math.log(len(centres))


@pytest.fixture(scope="module")
def tiny() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.uniform(-1, 1, (40, 6)), rng.uniform(-1, 1, (30, 6))


# -- pure functions ---------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.01, 0.3, 2.0])
def test_log_mixture_is_scipys(tiny, epsilon: float, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    points, centres = tiny
    monkeypatch.setattr(divergence, "_BLOCK", 7 * len(centres))
    found = divergence.log_mixture(points, centres, epsilon)
    expected = mixture(points, centres, epsilon)
    print(f"largest relative difference {np.abs(found / expected - 1).max():.1e}")
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_groups_are_mixtures_of_their_own(tiny) -> None:  # type: ignore[no-untyped-def]
    points, centres = tiny
    labels = (np.arange(40) % 3, np.arange(30) % 3)
    found = divergence.log_mixture(points, centres, 0.3, labels)
    squares = divergence.mean_squared_distance(points, centres, labels)
    for label in range(3):
        own = points[labels[0] == label], centres[labels[1] == label]
        np.testing.assert_allclose(found[labels[0] == label], mixture(*own, 0.3), rtol=1e-10)
        brute = ((own[0][:, None] - own[1]) ** 2).sum(2).mean(1)
        np.testing.assert_allclose(squares[labels[0] == label], brute, rtol=1e-12)
    with pytest.raises(MembenchError, match="label 7: no image"):
        divergence.log_mixture(points, centres, 0.3, (np.full(40, 7), labels[1]))


def test_entropy_of_one_gaussian_is_analytic() -> None:
    rng = np.random.default_rng(0)
    x = 0.1 * rng.standard_normal((4000, 16))
    log_q = divergence.log_mixture(x, np.zeros((1, 16)), 0.1)[:, None]
    found = divergence.memorization_divergence(log_q, log_q[:, :, None] - 1.5)
    entropy = 16 / 2 * math.log(2 * math.pi * math.e * 0.01)
    assert abs(found["entropy"]["value"] - entropy) < 4 * found["entropy"]["standard_error"]
    assert found["value"] == pytest.approx(1.5, abs=1e-12)  # paired: no noise is left
    assert found["standard_error"] < 1e-12


def gaussian_kl(size: int, a: float, b: float, shift: float) -> float:
    """KL(Normal(0, a^2 I) || Normal(shift, b^2 I))."""
    return size * (math.log(b / a) + a**2 / (2 * b**2) - 0.5) + size * shift**2 / (2 * b**2)


def test_the_stated_error_covers_the_known_divergence() -> None:
    """KL of Gaussians from noisy log p: a 95 % interval holds it in 95 % of 400 repetitions."""
    truth, hits, parts = gaussian_kl(5, 0.2, 0.3, 0.1), 0, []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        x = 0.2 * rng.standard_normal((60, 2, 5))
        flat = x.reshape(-1, 5)
        log_q = mixture(flat, np.zeros((1, 5)), 0.2).reshape(60, 2)
        log_p = mixture(flat, np.full((1, 5), 0.1), 0.3).reshape(60, 2, 1)
        log_p = log_p + 0.5 * rng.standard_normal((60, 2, 3))
        found = divergence.memorization_divergence(log_q, log_p)
        hits += abs(found["value"] - truth) < 1.96 * found["standard_error"]
        parts.append(found["of_replicates"])
    print(f"coverage {hits / 400:.3f}")
    assert 0.91 < hits / 400 < 0.985  # 3.5 binomial errors around 0.95
    assert np.mean(parts) == pytest.approx(0.5 / math.sqrt(60 * 2 * 3), rel=0.02)


def test_pointwise_and_semantic_have_their_closed_forms() -> None:
    """p = Normal(m, s^2 I): every term is known."""
    rng = np.random.default_rng(1)
    size, s, e = 8, 0.3, 0.2
    centre, images = np.full(size, 0.1), rng.uniform(-1, 1, (20, size))
    x = centre + s * rng.standard_normal((20000, size))
    log_p = mixture(x, centre[None], s)[:, None]
    squares = divergence.mean_squared_distance(x, images)
    mean_square = size * s**2 + ((images - centre) ** 2).sum(1)  # E||x - x_i||^2
    entropy = size / 2 * math.log(2 * math.pi * math.e * s**2)
    truth = (-entropy + size / 2 * math.log(2 * math.pi * e) + mean_square / (2 * e)).sum()
    found = divergence.pointwise_memorization(log_p, squares, e, size, len(images))
    z = (found["sum"] - truth) / (20 * found["standard_error"])
    semantic = divergence.semantic_memorization(squares, len(images))
    z_semantic = (semantic["sum"] - mean_square.sum()) / (20 * semantic["standard_error"])
    print(f"pointwise {found['sum']:.2f}, known {truth:.2f}; z {z:.2f}, {z_semantic:.2f}")
    assert abs(z) < 3.5 and abs(z_semantic) < 3.5
    assert found["standard_error"] < 0.01 * abs(found["value"])
    assert squares[:5] == pytest.approx(((x[:5, None] - images) ** 2).sum(2).mean(1), rel=1e-12)


def test_pointwise_cannot_tell_copies_from_the_average() -> None:
    """What its docstring says: two sets of one mean and one total variance are one set to it."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((30, 6))
    turned = 2 * images.mean(0) - images  # mirrored through the mean
    x = images[:10]  # copies of the first set
    np.testing.assert_allclose(
        divergence.mean_squared_distance(x, images),
        divergence.mean_squared_distance(x, turned),
        rtol=1e-12,
    )


@pytest.mark.parametrize("k", [1, 4])
def test_knn_terms_are_those_of_brute_force(k: int) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((40, 3)), rng.standard_normal((50, 3)) + 0.5
    found, _ = divergence.knn_terms(x, y, k)
    for i, point in enumerate(x):
        own = np.sort(np.linalg.norm(np.delete(x, i, 0) - point, axis=1))[k - 1]
        other = np.sort(np.linalg.norm(y - point, axis=1))[k - 1]
        assert found[i] == pytest.approx(3 * math.log(other / own) + math.log(50 / 39), abs=1e-5)


def test_knn_recovers_the_divergence_of_gaussians() -> None:
    """Bias and error over 24 sample sets; the stated error is that of the spread."""
    truth = gaussian_kl(2, 1.0, 1.5, 0.5)
    values, errors = [], []
    for seed in range(24):
        rng = np.random.default_rng(seed)
        x, y = rng.standard_normal((1500, 2)), 0.5 + 1.5 * rng.standard_normal((1500, 2))
        terms, jackknife = divergence.knn_terms(x, y, 3)
        if seed == 0:  # a block left out is the estimate of what is left
            rest = np.arange(len(x)) % 10 != 4
            again, _ = divergence.knn_terms(x[rest], y[rest], 3)
            assert jackknife[4] == pytest.approx(again.mean(), abs=1e-9)
        found = divergence.knn_divergence(terms[:, None], jackknife[:, None])
        values.append(found["value"])
        errors.append(found["standard_error"])
    hits = np.mean(np.abs(np.array(values) - truth) < 1.96 * np.array(errors))
    ratio = np.mean(errors) / np.std(values)
    print(
        f"known {truth:.3f}, mean {np.mean(values):.3f}, coverage {hits:.2f}, "
        f"error / spread {ratio:.2f}"
    )
    assert np.mean(values) == pytest.approx(truth, abs=0.03)
    assert 0.7 < ratio < 1.4
    assert hits > 0.8  # 10 blocks and a bias cost some of the 95 %


def test_knn_says_what_equal_points_do() -> None:
    x = np.repeat(np.random.default_rng(0).standard_normal((5, 3)), 2, axis=0)
    y = np.random.default_rng(1).standard_normal((12, 3))
    with pytest.raises(MembenchError, match="10 points have 1 equal points in the same set"):
        divergence.knn_terms(x, y, 1)
    with pytest.raises(MembenchError, match="in the other set"):
        divergence.knn_terms(y, y, 1)
    assert np.isfinite(divergence.knn_terms(x, y, 2)[0]).all()
    assert np.isfinite(divergence.knn_terms(x, y, 1, floor=0.01)[1]).all()
    with pytest.raises(MembenchError, match="k: 12, expected 1 to 9"):
        divergence.knn_terms(y, y, 12)


def test_nan_and_single_images_are_refused() -> None:
    with pytest.raises(MembenchError, match="NaN or infinite"):
        divergence.memorization_divergence(np.zeros((3, 1)), np.full((3, 1, 1), np.nan))
    with pytest.raises(MembenchError, match="at least two"):
        divergence.memorization_divergence(np.zeros((1, 1)), np.zeros((1, 1, 1)))
    with pytest.raises(MembenchError, match="expected a width above 0"):
        divergence.log_mixture(np.zeros((1, 2)), np.zeros((1, 2)), 0.0)


# -- of a target ------------------------------------------------------------------------------


@pytest.fixture
def known(small: Dataset, tmp_path: Path) -> Lab:
    """A closed-form target of kernel 0.4 over the members of the small data set, at 4 x 4 pixels.

    In 256 dimensions its field nearly jumps between members, which no fixed solver resolves.
    """
    card = small.card
    changes = {
        "extraction": card.extraction.model_copy(
            update={"images_per_scale": 64, "sampling": Sampling(steps=10, batch_size=32)}
        ),
        "images": card.images.model_copy(update={"height": 4, "width": 4}),
    }
    dataset = replace(
        small,
        card=card.model_copy(update=changes),
        **{
            name: replace(part, images=np.ascontiguousarray(part.images[:, ::4, ::4]))
            for name in ("members", "auxiliary", "heldout")
            if (part := getattr(small, name))
        },
    )
    store = Store(tmp_path / "results")
    return Lab(dataset, closed_form(dataset, 0.4), store, silent, registry=Registry())


def settle(**settings) -> overlap.DivergenceSpec:  # type: ignore[no-untyped-def]
    return diverge.settle(64, **({"images": 24} | settings))


@pytest.mark.parametrize("estimator", ["pf_ode", "elbo"])
def test_divergence_of_a_known_density(known: Lab, estimator: str) -> None:
    """Against log q_e - log p by the exact mixtures, at the very points that were drawn."""
    probes, steps = {"pf_ode": (8, 24), "elbo": (8, 64)}[estimator]
    spec = settle(estimator=estimator, epsilons=(0.4, 0.2), steps=steps, probes=probes, images=48)
    cell = diverge.build_cell(spec, known)
    record = diverge.run(cell)
    assert diverge.verify_divergence(cell.folder) == record
    sets = {"members": known.dataset.members, "heldout": known.dataset.heldout_twin}
    centres = {side: overlap.flat(images.images) for side, images in sets.items()}
    sigma = record["identity"]["sigma_0"] if estimator == "pf_ode" else 0.0
    rows = overlap.chosen_rows(spec, 64)
    for row in record["results"]["epsilons"]:
        found = row["memorization_divergence"]
        for side, own in centres.items():
            noise = [overlap.generator(spec, side, int(i), 0).standard_normal(16) for i in rows]
            x = own[rows] + row["epsilon"] * np.stack(noise)
            each = mixture(x, own, row["epsilon"])
            each = each - mixture(x, centres["members"], math.hypot(0.4, sigma))
            off, sure = found[side]["value"] - each.mean(), found[side]["of_replicates"]
            print(f"{estimator} {side}: {each.mean():.2f} known, {off:+.3f} off, {sure:.3f} error")
            if estimator == "pf_ode":
                assert abs(off) < 3.5 * sure + row["solver"][side]["largest"]
                assert row["solver"][side]["largest"] < 0.3
            else:  # never below, but for the noise; and near
                assert -3.5 * sure < off < 3.5 * sure + 0.02 * 16
            # what was drawn tells the divergence itself within the error that is stated of it
            many = own[np.random.default_rng(5).integers(64, size=4000)]
            many = many + row["epsilon"] * np.random.default_rng(6).standard_normal(many.shape)
            truth = mixture(many, own, row["epsilon"])
            truth = truth - mixture(many, centres["members"], math.hypot(0.4, sigma))
            assert (
                abs(found[side]["value"] - truth.mean())
                < 3.5 * math.hypot(found[side]["standard_error"], truth.std() / math.sqrt(4000))
                + 0.3
            )
        assert found["gap"]["value"] > 2 * found["gap"]["standard_error"]


def test_pointwise_of_a_known_density(known: Lab) -> None:
    """Samples of the target itself: the density at them, and their distances, are exact."""
    spec = settle(estimator="pf_ode", epsilons=(0.2,), steps=24, probes=8)
    record = diverge.run(cell := diverge.build_cell(spec, known))
    found = record["results"]["epsilons"][0]["pointwise_memorization"]
    sigma = record["identity"]["sigma_0"]
    members = overlap.flat(known.dataset.members.images)
    clean = overlap.flat(known.store.get(cell.samples).images[:24])
    noise = [overlap.generator(spec, "samples", i, 0).standard_normal(16) for i in range(24)]
    x = clean + sigma * np.stack(noise)
    total = 0.0
    for x_i in members:
        normal = multivariate_normal(x_i, 0.2 * np.eye(16)).logpdf(x)
        total += (mixture(x, members, math.hypot(0.4, sigma)) - normal).mean()
    log_p = overlap.load_arrays(cell.folder / diverge.VALUES)["samples_log_p"]
    error = 64 * math.sqrt((log_p.var(1, ddof=1) / 8).sum()) / 24  # of the probes
    print(f"pointwise: {found['members']['sum']:.2f}, known there {total:.2f}, error {error:.2f}")
    assert abs(found["members"]["sum"] - total) < 3.5 * error
    assert error < 0.02 * total
    assert found["members"]["sum"] == pytest.approx(64 * found["members"]["value"])


def test_knn_sees_which_set_was_copied(fashion_mini: Dataset) -> None:
    """Samples that copy members lie nearer to them; of the twins, the sign turns round."""
    dataset = fashion_mini
    for pixels, sign in ((dataset.members.images, 1), (dataset.heldout_twin.images, -1)):
        found = diverge.knn_of_images(np.asarray(pixels), dataset, (0.2,))
        for row in found["epsilons"]:
            assert sign * row["memorization_divergence"]["gap"]["z"] > 2
    described = diverge.knn_of_images(
        np.asarray(dataset.members.images), dataset, (0.1,), space="lowest rows",
        describe=lambda images: overlap.flat(images[:, -8:]),
    )  # fmt: skip
    assert described["space"] == "lowest rows"
    assert described["epsilons"][0]["memorization_divergence"]["gap"]["z"] > 2


@pytest.mark.parametrize("plugin", [False, True])
def test_semantic_memorization_in_the_cards_descriptor(known: Lab, plugin: bool) -> None:
    """All pairs, written out: descriptors of the sets themselves, and of a plugin."""
    if plugin:
        choice = DescriptorChoice(name="pixels")
        attack = known.dataset.card.attack.model_copy(update={"cluster_descriptor": choice})
        card = known.dataset.card.model_copy(update={"attack": attack})
        known = replace(known, dataset=replace(known.dataset, card=card))
    cell = diverge.build_cell(settle(estimator="knn", epsilons=(0.1,)), known)
    record = diverge.run(cell)
    found = record["results"]["semantic_memorization"]
    assert found["descriptor"] == ("pixels" if plugin else "pixels_pca")
    generated = known.store.get(cell.samples).images
    if plugin:
        z = known.store.get(known.descriptors_of_images(cell.samples, choice))
        sets = [
            known.store.get(known.descriptors_of(s, choice))[:64] for s in ("members", "heldout")
        ]
    else:
        *sets, z = overlap.set_descriptors(np.asarray(generated), known.dataset, "pixels_pca")
    for side, centres in zip(overlap.SIDES, sets, strict=True):
        brute = sum(((np.float64(z) - np.float64(z_i)) ** 2).sum(1).mean() for z_i in centres)
        assert found[side]["sum"] == pytest.approx(brute, rel=1e-9)
    assert diverge.verify_divergence(cell.folder) == record


def test_batches_and_kills_change_nothing(known: Lab, tmp_path: Path) -> None:
    spec = settle(estimator="pf_ode", epsilons=(0.2,), steps=2, probes=1, images=10, batch_size=4)
    whole = diverge.run(diverge.build_cell(spec, known))

    class Killed(Exception):
        pass

    target, calls = known.target, 0
    original = target.mixture  # type: ignore[attr-defined]

    def dies(labels):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Killed
        return original(labels)

    elsewhere = replace(known, store=Store(tmp_path / "again"))
    target.mixture = dies  # type: ignore[attr-defined]
    with pytest.raises(Killed):
        diverge.run(diverge.build_cell(spec, elsewhere))
    calls = 100
    resumed = diverge.run(diverge.build_cell(spec, elsewhere))
    assert calls - 100 < 13  # one for each batch and half-step check: two were kept
    assert resumed["results_sha256"] == whole["results_sha256"]
    bigger = spec.model_copy(update={"batch_size": 64})
    one_batch = diverge.run(diverge.build_cell(bigger, known))
    old, new = (
        r["results"]["epsilons"][0]["memorization_divergence"]["gap"] for r in (whole, one_batch)
    )
    assert new["value"] == pytest.approx(old["value"], rel=1e-9)


def test_an_edited_record_is_found(known: Lab) -> None:
    spec = settle(estimator="knn", epsilons=(0.1,))
    cell = diverge.build_cell(spec, known)
    diverge.run(cell)
    path = cell.folder / diverge.RECORD
    clean = json.loads(path.read_text())
    assert "<svg" in (cell.folder / diverge.FIGURE).read_text()

    def edited(change) -> None:  # type: ignore[no-untyped-def]
        record = json.loads(json.dumps(clean))
        change(record)
        path.write_text(json.dumps(record))

    def forge(record: dict) -> None:  # type: ignore[type-arg]
        from membench.record import seal

        record["results"]["epsilons"][0]["memorization_divergence"]["members"]["value"] += 1e-9
        record["results_sha256"] = seal(record)

    edited(forge)
    with pytest.raises(MembenchError, match=r"members\.value is .* recomputed"):
        diverge.verify_divergence(path)
    edited(lambda record: record["results"].update(extra=1))
    with pytest.raises(MembenchError, match="results_sha256"):
        diverge.verify_divergence(path)
    edited(lambda record: record["identity"].update(sigma_0=1))
    with pytest.raises(MembenchError, match="id is not the hash"):
        diverge.verify_divergence(path)
    edited(lambda record: None)
    with open(cell.folder / diverge.VALUES, "r+b") as stream:
        stream.truncate(100)
    with pytest.raises(MembenchError, match="missing or changed"):
        diverge.verify_divergence(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "ode"}, "--estimator: Input should be"),
        ({"estimator": "knn", "steps": 3}, "--steps: the estimator knn does not use it"),
        ({"estimator": "elbo", "neighbours": 3}, "--neighbours: the estimator elbo"),
        ({"estimator": "elbo", "images": 65}, "--images 65: there are 64 members"),
        ({"estimator": "elbo", "epsilons": (0.1, 0.1)}, "--epsilons: a width is named twice"),
        ({"estimator": "elbo", "epsilons": (-1.0,)}, "--epsilons: expected one or more"),
    ],
)
def test_wrong_settings_get_one_line(settings: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(MembenchError, match=message):
        settle(**settings)


def test_marginals_are_for_conditional_targets(known: Lab) -> None:
    with pytest.raises(MembenchError, match="--marginal: target closed_form is not told"):
        diverge.build_cell(settle(estimator="elbo", marginal=True), known)


def test_held_out_labels_of_a_conditional_target(small: Dataset) -> None:
    members = np.arange(64) % 10
    assert overlap.set_labels(None, None, small, 0) is None
    own = overlap.set_labels("labels", members, small, 0)
    assert own is not None and own["heldout"].tolist() == small.heldout_twin.labels.tolist()
    drawn = overlap.set_labels("random_labels", members, small, 0)
    assert drawn is not None and drawn["members"] is members
    assert set(drawn["heldout"]) <= set(range(10)) and len(set(drawn["heldout"])) > 5


def test_the_marginal_of_a_conditional_target_is_the_mean_over_labels(small: Dataset) -> None:
    """A target whose density depends on the label in a known way."""
    parts = [closed_form(small, kernel) for kernel in (0.2, 0.4)]

    class Conditional:
        labels = np.array([0, 1, 1, 1])
        shape, abar, device = parts[0].shape, parts[0].abar, parts[0].device

        def mixture(self, labels):  # type: ignore[no-untyped-def]
            (kind,) = set(labels.tolist())
            return parts[kind].mixture(None)

    x = torch.from_numpy(small.members.images[:3] / 127.5 - 1).permute(0, 3, 1, 2)
    found = {}
    for marginal in (True, False):
        spec = settle(estimator="elbo", epsilons=(0.1,), steps=8, probes=2, marginal=marginal)
        found[marginal] = [
            overlap.log_density(
                spec, Conditional(), x, np.full(3, label),  # type: ignore[arg-type]
                [np.random.default_rng(i) for i in range(3)], 8,
            )
            for label in (0, 1)
        ]  # fmt: skip
    expected = np.logaddexp(found[False][0] + math.log(0.25), found[False][1] + math.log(0.75))
    np.testing.assert_allclose(found[True][0], expected, rtol=1e-12)


def test_the_command(command) -> None:  # type: ignore[no-untyped-def]
    arguments = ("diverge", "--dataset", "fashion_mini", "--target", "oracle:1")
    wrong = command(*arguments, "--epsilon", "x", check=False)
    assert wrong.returncode == 2 and "--epsilon x: expected numbers" in wrong.stderr
