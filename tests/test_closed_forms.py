"""The radial layer, densities in closed form, and runs that start there."""

import json
import math
import re
from functools import partial

import numpy as np
import polars as pl
import pytest
import torch
from scipy.stats import multivariate_t
from sklearn.mixture import GaussianMixture
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import rnode
from helpers import DOPRI5, RK4, TWO_STEPS, Linear, call, column, make_flow, refused
from rnode import Flow, Gaussian, Mixture, Piece, Probes, Solver
from rnode.data import closed_forms, mixtures
from rnode.data.closed_forms import fit_base, fit_candidates, fit_z, promising, ranked, size_of
from rnode.data.datamodule import DataModule
from rnode.data.densities import toy
from rnode.data.mixtures import RIDGE, expect, fit_mixture, maximize
from rnode.data.tables import table
from rnode.radial import Radial, fit_t
from rnode.transforms import Batch

A = np.array([[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [-0.3, 0.2, 1.0]])


@pytest.fixture(scope="module")
def heavy_tails():
    """Rows of a multivariate t distribution with 2 degrees of freedom, and the distribution."""
    truth = multivariate_t([1, 2, 3], A @ A.T, df=2)
    return truth.rvs(6000, random_state=0), truth


def fit_radial(x):
    return Radial.fit(x, *fit_t(x)[:2])


def test_the_degrees_of_freedom_of_a_t_distribution_are_found(heavy_tails):
    *_, nu = fit_t(torch.from_numpy(heavy_tails[0]))
    assert nu == pytest.approx(2, abs=0.2)


def test_a_radial_layer_is_inverted_and_has_autograds_log_determinant(heavy_tails):
    x = torch.from_numpy(heavy_tails[0])
    layer = fit_radial(x[:3000])
    x = torch.cat([x[3000:3020], 100 * x[:5]])  # also beyond the last knots
    centre, log_det = layer.forward(layer.mean[None])
    assert centre.isfinite().all()
    assert log_det.isfinite().all()
    z, log_det = layer.forward(x)
    torch.testing.assert_close(layer.inverse(z), x)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: layer.forward(x[None])[0][0]))(x)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian).logabsdet)


def test_a_radial_layer_of_a_constant_radius_is_linear():
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]).double().repeat(9, 1)
    layer = fit_radial(x)
    z, log_det = layer.forward(3 * x)
    torch.testing.assert_close(z, 3 * layer.forward(x)[0])
    torch.testing.assert_close(layer.inverse(z), 3 * x)
    assert log_det.isfinite().all()


def test_a_radial_layer_makes_heavy_tails_normal(heavy_tails):
    rows, truth = heavy_tails
    x = torch.from_numpy(rows)
    z, log_det = fit_radial(x[:3000]).forward(x[3000:])
    normal = MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double())
    difference = truth.logpdf(rows[3000:]) - (normal.log_prob(z) + log_det).numpy()
    assert abs(difference.mean()) < 0.05  # the Kullback–Leibler divergence
    assert z.norm(dim=1).quantile(0.5) == pytest.approx(1.538, abs=0.05)  # of a normal in 3-D


def module(frame, tmp_path, **options):
    frame.write_parquet(path := tmp_path / "rows.parquet")
    data = DataModule(table, 64, 500, path=str(path), **options)
    data.setup()
    return data


def test_candidates_are_compared_by_their_likelihood_of_the_validation_rows(heavy_tails, tmp_path):
    rows, truth = heavy_tails
    data = module(pl.DataFrame(rows, ["a", "b", "c"]), tmp_path)
    candidates = fit_candidates(data, "auto", 500, seed=0, seconds=np.inf)
    best, worst = candidates[0], candidates[-1]
    assert "radial" in best.name
    assert worst.name == "as it is, a Gaussian"
    nats = -truth.logpdf(data.splits.val[:500].numpy()).mean()
    assert best.nats == pytest.approx(nats, abs=0.1)
    assert worst.nats > nats + 0.5
    first = [c.name for c in fit_candidates(data, "auto", 500, seed=0, seconds=0)]
    assert first == ["as it is, radial, a Gaussian"]


def test_sizes_beside_the_best_are_tried():
    data = DataModule(toy, 512, 2000, name="eight_gaussians", train=5000)
    data.setup()
    candidates = fit_candidates(data, "auto", 2000, seed=0, seconds=np.inf)
    assert {size_of(candidate.base) for candidate in candidates} == {1, 4, 8, 16, 32, 64}
    assert size_of(candidates[0].base) in (8, 16)
    entropy = np.log(8 * 2 * np.pi * np.e * 0.14**2)
    assert candidates[0].nats == pytest.approx(entropy, abs=0.03)


def test_a_radial_candidate_that_is_not_significantly_worse_is_preferred(heavy_tails, tmp_path):
    data = module(pl.DataFrame(heavy_tails[0], ["a", "b", "c"]), tmp_path)
    radial, *_ = fit_candidates(data, "auto", 500, seed=0, seconds=np.inf)
    plain = radial._replace(transform=data.transform)
    for better, best in ((torch.randn(500), radial), (torch.ones(500), plain)):
        other = plain._replace(log_prob=radial.log_prob + better)
        assert ranked([other, radial])[0].transform is best.transform


def test_a_larger_mixture_must_be_ahead_by_more_than_chance(heavy_tails, tmp_path):
    data = module(pl.DataFrame(heavy_tails[0], ["a", "b", "c"]), tmp_path)
    candidates = fit_candidates(data, "mixture", 500, seed=0, seconds=np.inf)
    small, large = (next(c for c in candidates if size_of(c.base) == n) for n in (4, 16))
    noise = torch.linspace(-1, 1, 500)  # its standard error is 0.026
    for ahead, best in ((0.01, small), (0.02, large)):
        large = large._replace(transform=small.transform, log_prob=small.log_prob + noise + ahead)
        assert size_of(ranked([large, small])[0].base) == size_of(best.base)


def test_a_transform_that_is_far_behind_is_given_up_for_good(heavy_tails, tmp_path):
    data = module(pl.DataFrame(heavy_tails[0], ["a", "b", "c"]), tmp_path)
    best, *_ = fit_candidates(data, "gaussian", 500, seed=0, seconds=np.inf)
    noise = torch.linspace(-1, 1, 500)
    close = best._replace(label="close", log_prob=best.log_prob + noise - 0.01)
    far = best._replace(label="far", log_prob=best.log_prob + noise - 0.5)
    candidates, every = [best, close, far], ["far", "close", best.label]
    assert promising(every, candidates, size=4) == [best.label, "close", "far"]
    assert promising(every, candidates, size=16) == [best.label, "close"]
    assert promising([best.label, "close"], candidates, size=64) == [best.label, "close"]


def test_logarithms_of_skewed_columns_are_tried(tmp_path):
    normal = np.random.default_rng(0).standard_normal((2000, 2))
    frame = pl.DataFrame({"income": np.exp(normal[:, 0]), "height": normal[:, 1] + 10})
    data = module(frame, tmp_path)
    best, *_ = fit_candidates(data, "gaussian", 200, seed=0, seconds=np.inf)
    assert [column.log for column in best.transform.columns] == [True, False]
    zero = frame.with_columns(income=pl.when(pl.int_range(2000) != 7).then("income").otherwise(0))
    for rows, options in ((zero, {}), (frame, {"log": []})):
        best_without, *_ = fit_candidates(
            module(rows, tmp_path, **options), "gaussian", 200, seed=0, seconds=np.inf
        )
        assert not any(column.log for column in best_without.transform.columns)
    entropy = np.log(2 * np.pi * np.e)  # of the logarithm and of the height
    assert best.nats == pytest.approx(entropy + np.log(frame["income"]).mean(), abs=0.15)


def test_columns_of_few_values_are_made_normal_by_quantiles(tmp_path):
    rng, n = np.random.default_rng(0), 5000
    memory = np.cumsum(rng.integers(1, 30, 40))[rng.integers(40, size=n)]
    price = memory + 100 * rng.normal(size=n)
    frame = pl.DataFrame({"memory": memory + rng.uniform(size=n), "price": price})
    found = fit_candidates(module(frame, tmp_path), "auto", 500, seed=0, seconds=np.inf)
    assert found[0].label == "quantiles"
    entropy = np.log(40) + np.log(100 * np.sqrt(2 * np.pi * np.e))
    assert found[0].nats == pytest.approx(entropy, abs=0.8)
    assert min(each.nats for each in found if each.label != "quantiles") > found[0].nats + 1


@pytest.mark.parametrize("size", [1, 2])
def test_a_base_is_fitted_given_c(size):
    """y = 3 c + noise of standard deviation 0.5; a label as well, whose part of c is singular."""
    label = torch.nn.functional.one_hot(torch.arange(4000) % 2, 2)
    c = torch.cat([label, torch.randn(4000, 1)], dim=1)
    y = 3 * c[:, 2:] + label[:, :1] + 0.5 * torch.randn(4000, 1)
    base = fit_base(Batch(y, torch.zeros(4000), torch.arange(4000), c), size, seed=0)
    mean = -base.log_prob(y.double(), c).mean()
    assert float(mean) == pytest.approx(np.log(0.5 * np.sqrt(2 * np.pi * np.e)), abs=0.12)


def test_the_density_of_several_fits_is_their_mean(monkeypatch):
    monkeypatch.setattr(closed_forms, "TOLERANCE_OF_FITS", closed_forms.TOLERANCE)
    y = torch.randn(300, 2)
    batch = Batch(y, torch.zeros(300), torch.arange(300), y[:, :0])
    each = [fit_base(batch, 4, seed).log_prob(y.double(), batch.c) for seed in range(3)]
    assert (each[0] - each[1]).abs().max() > 0.1
    mean = torch.stack(each).logsumexp(0) - np.log(3)
    base = fit_base(batch, 4, seed=0, fits=3)
    torch.testing.assert_close(base.log_prob(y.double(), batch.c), mean)
    assert size_of(base) == 12
    assert size_of(fit_base(batch, 4, seed=0, end=0, fits=3)) == 4


SHORT = ["trainer.max_epochs=2", "trainer.limit_train_batches=2", "callbacks.interval=null"]


def test_the_base_of_a_trained_flow_is_fitted_to_z(tmp_path, monkeypatch):
    """dz/dt = A z with A = log 2 · I doubles y: z of three Gaussians is three Gaussians."""
    rng = np.random.default_rng(0)
    centres = 4 * rng.normal(size=(3, 2))
    rows = centres[rng.integers(3, size=6000)] + rng.normal(size=(6000, 2))
    data = module(pl.DataFrame(rows, ["a", "b"]), tmp_path)
    field = Linear(np.log(2) * torch.eye(2).double())
    flow = Flow((2,), [Piece(field)], Solver(RK4, DOPRI5, dtype="float64"), Probes("exact")).eval()
    flow.base = Gaussian(torch.zeros(2).double(), 4 * torch.eye(2).double())
    batch = data.transform.for_evaluation(*data.fetch("val", range(500)), 0)
    gaussian = flow.log_prob(batch.y) + batch.log_det
    flow.base, log_prob = fit_z(data, flow, 500, seed=0, seconds=np.inf)
    mixture = flow.log_prob(batch.y) + batch.log_det
    torch.testing.assert_close(log_prob, mixture.detach(), atol=1e-4, rtol=0)
    distances = np.square(data.splits.val[:500, None].numpy() - centres).sum(-1)
    truth = np.log(np.exp(-distances / 2).mean(1) / (2 * np.pi))
    assert abs(float(mixture.detach().mean()) - truth.mean()) < 0.03
    assert float(gaussian.mean()) < truth.mean() - 0.1
    again, log_prob_again = fit_z(data, flow, 500, seed=0, seconds=np.inf)
    assert again.means.shape == flow.base.means.shape  # no larger one is better
    assert 0 <= float((log_prob_again - log_prob).mean()) < 0.01
    flow.base = Mixture(torch.ones(1), torch.full((1, 2), 9.0), torch.eye(2)[None])
    assert fit_z(data, flow, 500, seed=0, seconds=0)[0] is flow.base  # there is no time
    torch.nn.init.zeros_(field.A)  # z is then y, but for the rounding of dopri5 in float32
    flow.float().solver = Solver(RK4, DOPRI5)
    solved = []
    solve = flow.solve
    monkeypatch.setattr(flow, "solve", lambda y, c: solved.append(len(y)) or solve(y, c))
    flow.base, log_prob = fit_z(data, flow, 500, seed=0, seconds=np.inf)
    assert sum(solved) == 500  # the validation rows alone
    mixture = flow.log_prob(batch.y) + batch.log_det
    torch.testing.assert_close(log_prob, mixture.detach().double(), atol=1e-4, rtol=0)


def test_mixtures_of_z_grow_as_long_as_they_become_better(monkeypatch):
    data = DataModule(toy, 512, 2000, name="eight_gaussians", train=5000)
    data.setup()
    flow = Flow((2,), [Piece(Linear(torch.zeros(2, 2)))], Solver(RK4, DOPRI5), Probes("exact"))
    flow.base = Gaussian(torch.zeros(2), torch.eye(2))
    monkeypatch.setattr("rnode.data.closed_forms.SIZES", (2,))  # then 4, 8, 16 …
    assert size_of(fit_z(data, flow, 2000, seed=0, seconds=np.inf)[0]) in (8, 16)


def test_a_run_is_never_behind_its_best_closed_form(run, tmp_path, capsys):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(2, 2))[rng.integers(2, size=400)]
    rows = pl.DataFrame(5 * centres + rng.normal(size=(400, 2)), ["a", "b"])
    rows.write_csv(path := tmp_path / "rows.csv")
    worse = ["optimizer.lr=1.0", "warmup_steps=0", "trainer.gradient_clip_val=null"]
    longer = [*SHORT, "trainer.max_epochs=8", "model.hidden=8"]
    folder = run("dataset=table", f"dataset.path={path}", *longer, *worse)
    out = capsys.readouterr().out
    assert "closed form" in out
    assert "closed_form.ckpt keeps this density; the flow starts at" in out
    assert "training stopped: the flow was far behind the density in closed form" in out
    measured = re.search(r"validation (\S+) ± \S+ nats \((\S+) bits/dim\)", out)
    nats, bits = map(float, measured.groups())
    assert nats == pytest.approx(2 * math.log(2) * bits, abs=2e-4)
    closed_form, gaussian, *trained = column(folder, "val/bits_per_dim")
    assert closed_form < gaussian < trained[0]
    assert len(trained) == 7 + 1  # epochs, and the mixture that follows
    assert trained[-1] <= closed_form
    density = rnode.load(folder)
    assert isinstance(density.flow_.base, rnode.Mixture)
    assert float(density.validation_bits_.mean()) == pytest.approx(trained[-1], rel=1e-5)
    closed = rnode.load(folder / "closed_form.ckpt")
    assert float(closed.validation_bits_.mean()) == pytest.approx(closed_form, rel=1e-5)
    samples = density.sample(500, seed=1)
    assert np.abs(samples.mean().to_numpy() - (5 * centres).mean(0)).max() < 1
    expected = density.log_prob(rows).mean()
    assert density.log_prob(samples).mean() == pytest.approx(expected, abs=0.2)


def test_a_run_without_an_end_of_its_own_stops_early(run, tmp_path, capsys):
    rows = np.random.default_rng(0).normal(size=(300, 2))
    pl.DataFrame(rows, ["a", "b"]).write_csv(path := tmp_path / "rows.csv")
    options = ["trainer.max_epochs=-1", "callbacks.early_stopping.patience=1", "optimizer.lr=1.0"]
    folder = run("dataset=table", f"dataset.path={path}", *SHORT, *options, "model.hidden=8")
    assert "mixtures are fitted for 0 s at most" in capsys.readouterr().out
    assert isinstance(rnode.load(folder).flow_.base, Mixture)


def test_a_run_with_logarithms_of_its_own_choice_is_evaluated_and_resumed(run, tmp_path):
    normal = np.random.default_rng(0).normal(size=(300, 2))
    path = tmp_path / "rows.csv"
    pl.DataFrame(np.exp(normal), ["a", "b"]).with_columns(c=normal[:, 0] > 0).write_csv(path)
    table = ["dataset=table", f"dataset.path={path}", "dataset.context=[c]", "model.hidden=8"]
    folder = run(*table, *SHORT)
    assert all(column.log for column in rnode.load(folder).data_.transform.columns)
    call("evaluate", str(folder), f"hydra.run.dir={tmp_path / 'evaluation'}")
    evaluated = json.loads((tmp_path / "evaluation/evaluation.json").read_text())
    result = json.loads((folder / "result.json").read_text())
    assert evaluated["bits_per_dim"] == pytest.approx(result["test/bits_per_dim"], rel=1e-5)
    last = folder / "last.ckpt"
    means = rnode.load(last).flow_.base.means
    run(*table, *SHORT, "trainer.max_epochs=4", "ckpt_path=auto")  # its best.ckpt has another base
    assert torch.equal(rnode.load(last).flow_.base.means, means)


def test_a_base_is_fitted_to_z_of_a_run_without_a_validation(run, tmp_path, capsys):
    rows = np.random.default_rng(0).normal(size=(300, 2))
    pl.DataFrame(rows, ["a", "b"]).write_csv(path := tmp_path / "rows.csv")
    table = ["dataset=table", f"dataset.path={path}", "model.hidden=8"]
    last = run(*table, *SHORT) / "last.ckpt"
    elsewhere = f"hydra.run.dir={tmp_path / 'elsewhere'}"
    call("train", *table, *SHORT, *TWO_STEPS[-1:], elsewhere, f"ckpt_path={last}")  # trains no step
    assert isinstance(rnode.load(tmp_path / "elsewhere").flow_.base, Mixture)
    line = refused(capsys, "train", *table, "trainer.limit_val_batches=0")
    assert "base=auto: needs validation" in line


def test_images_start_at_a_gaussian_of_z(run):
    folder = run("base=gaussian", *SHORT, "model.hidden=4")
    first = column(folder, "val/bits_per_dim")[0]
    assert first == pytest.approx(2.33, abs=0.03)  # a flow with the normal base begins at 8
    assert rnode.load(folder).flow_.base.means.shape == (1, 64)


def test_as_z_is_the_flow_whose_fields_are_zero():
    flow = make_flow((1, 8, 8))
    for parameter in flow.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.randn(3, 1, 8, 8).double()
    torch.testing.assert_close(flow.as_z(x), flow(x).z)
    torch.testing.assert_close(flow.as_x(flow.as_z(x)), x)


def test_a_mixture_is_that_of_the_textbook(monkeypatch):
    """scikit-learn's fit from there, by whole passes, has the same likelihood."""
    monkeypatch.setattr(mixtures, "PASSES", 1000)
    monkeypatch.setattr(mixtures, "FAR", 0.0)  # all in float64
    rng = np.random.default_rng(0)
    centres = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    x = torch.from_numpy(centres[rng.integers(3, size=3000)] + rng.normal(size=(3000, 2)))
    fit = partial(fit_mixture, tolerance=1e-12)
    weights, means, covariances = fit(x, 3, seed=0)
    start = {"weights_init": weights, "means_init": means, "precisions_init": covariances.inverse()}
    reference = GaussianMixture(3, reg_covar=RIDGE, tol=1e-12, max_iter=1000, **start).fit(x)
    base = Mixture(weights, means, covariances)
    ours = base.log_prob(x, x[:, :0])
    assert float(ours.mean()) == pytest.approx(reference.score(x), abs=1e-8)
    model = MixtureSameFamily(Categorical(weights), MultivariateNormal(means, covariances))
    sums, sums_of_quarters = torch.zeros(3, 9).double(), torch.zeros(12, 9).double()
    total = expect([x], (weights, means, covariances), sums)
    assert total == pytest.approx(float(model.log_prob(x).sum()))
    quarters = weights.repeat(4) / 4, means.repeat(4, 1), covariances.repeat(4, 1, 1)
    expect([x], quarters, sums_of_quarters)
    torch.testing.assert_close(sums_of_quarters.unflatten(0, (4, 3)).sum(0), sums)
    cut_off = fit(x, 3, seed=0, end=0)
    going_on = fit(x, 3, seed=0, start=cut_off)
    assert (cut_off[1] - means).abs().max() > 0.01
    torch.testing.assert_close(going_on[1], means, atol=1e-4, rtol=0)
    one, mean, covariance = fit_mixture(x, 1, seed=0)
    torch.testing.assert_close(mean[0], x.mean(0))
    torch.testing.assert_close(covariance[0], torch.cov(x.T, correction=0) + RIDGE * torch.eye(2))
    assert one == 1


def test_a_fit_in_float32_is_that_in_float64(monkeypatch):
    """Narrow components far from the origin need the difference of large numbers."""
    rng = np.random.default_rng(0)
    centres = np.array([[0.0, 0.0], [4.9, -4.9], [5.1, 5.1], [300.0, 0.0]])
    component = rng.choice(4, 8000, p=[0.97, 0.01, 0.01, 0.01])
    width = np.where(component == 0, 1.0, 0.001)[:, None]
    x = torch.from_numpy(centres[component] + width * rng.normal(size=(8000, 2)))
    weights, means, covariances = fit_mixture(x, 8, seed=0)
    monkeypatch.setattr(mixtures, "FAR", 0.0)
    exact = fit_mixture(x, 8, seed=0)
    torch.testing.assert_close(weights, exact[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(means, exact[1], atol=1e-4, rtol=0)
    torch.testing.assert_close(covariances, exact[2], atol=1e-5, rtol=1e-4)
    assert exact[2][:, 0, 0].min() < 2e-4


def test_sums_of_a_component_without_rows_are_errors_of_rounding():
    """Its covariance is the ridge, not what such errors are divided by no rows."""
    sums = [[0.1, 1, 0, 1, -1, 0, 0, 0, 0], [-0.1, 1, 1, 1, 1, 3, 1, -3, 1]]
    sums = 1e-12 * torch.tensor(sums).double()
    weights, _, covariances = maximize(sums)
    torch.testing.assert_close(covariances, RIDGE * torch.eye(2).double().expand(2, 2, 2))
    assert weights.tolist() == [0.5, 0.5]


def test_covariances_are_shrunk_to_their_mean():
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(30, 3)) * [1, 2, 3])
    parts = x[:10], x[10:]
    sums = torch.stack([mixtures.statistics(part).sum(0) for part in parts])
    own = torch.stack([torch.cov(part.T, correction=0) for part in parts])
    mean = own[0] / 3 + own[1] * 2 / 3
    weights, means, covariances = maximize(sums, shrinkage=2)
    ridge = RIDGE * torch.eye(3)
    torch.testing.assert_close(covariances[0], (10 * own[0] + 6 * mean) / 16 + ridge)
    torch.testing.assert_close(covariances[1], (20 * own[1] + 6 * mean) / 26 + ridge)
    torch.testing.assert_close(means, torch.stack([part.mean(0) for part in parts]))
    torch.testing.assert_close(weights, torch.tensor([1 / 3, 2 / 3]).double())


def test_few_rows_have_shrunk_covariances_and_spikes_do_not(tmp_path):
    rng = np.random.default_rng(0)
    few = 3 * rng.normal(size=(4, 8))[rng.integers(4, size=300)] + rng.normal(size=(300, 8))
    spread = np.array([0.01, 1])[rng.integers(2, size=8000)]
    spikes = np.stack([rng.normal(size=8000), spread * rng.normal(size=8000)], axis=1)
    for rows, shrunk in ((few, True), (spikes, False)):
        data = module(pl.DataFrame(rows), tmp_path)
        val = len(data.splits.val)
        best, *_ = fit_candidates(data, "mixture", val, seed=0, seconds=np.inf)
        assert best.name.endswith("shrunk") == shrunk
