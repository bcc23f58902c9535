"""probe.py's numeric core against oracles: NumPy, scikit-learn, closed forms."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

import probe
from ijepa import ViT


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small matrices: a second thread gains nothing, and waits where others use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------- features


@pytest.fixture
def encoder():
    return ViT(img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=3, init_std=0.2)


def test_pooled_features_are_averages_over_patches_deepest_layer_last(encoder):
    images = torch.randn(10, 3, 16, 16)
    with torch.no_grad():
        layers = encoder.last_layers(images, 2)
        last = encoder(images).mean(1)
    features = probe.pooled_features(encoder, images.split(4), layers=2)
    assert features.dtype == torch.float32 and features.shape == (10, 48)
    torch.testing.assert_close(features, torch.cat([x.mean(1) for x in layers], dim=1))
    torch.testing.assert_close(features[:, 24:], last)
    assert (features[:, :24] - last).abs().max() > 0.01  # the layers do differ


def test_pooled_features_do_not_depend_on_batch_size(encoder):
    images = torch.randn(11, 3, 16, 16)
    whole = probe.pooled_features(encoder, [images], layers=3)
    for size in (1, 4, 10):
        parts = probe.pooled_features(encoder, images.split(size), layers=3)
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)


def test_pooled_features_in_bf16_are_close_and_can_train_a_head(encoder):
    images = torch.randn(8, 3, 16, 16)
    exact = probe.pooled_features(encoder, [images])
    rough = probe.pooled_features(encoder, [images], bf16=True)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.05
    head = torch.nn.Linear(24, 2)
    head(exact).sum().backward()  # fails on a tensor born in inference mode
    assert head.weight.grad.abs().sum() > 0


def test_features_that_are_not_finite_are_refused_by_layer_and_number(encoder):
    images = torch.randn(9, 3, 16, 16)
    with torch.no_grad():
        encoder.blocks[1].mlp.fc2.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"layer 2 of 3 .*9 of 9 images"):
        probe.pooled_features(encoder, images.split(4), layers=3)
    with pytest.raises(ValueError, match=r"layer 3 of 3 .*9 of 9 images"):
        probe.pooled_features(encoder, images.split(4))
    with torch.no_grad():
        encoder.blocks[1].mlp.fc2.bias[0] = 0
    images[[2, 7]] = float("inf")
    with pytest.raises(ValueError, match=r"layer 1 of 3 .*2 of 9 images"):
        probe.pooled_features(encoder, images.split(4), layers=3)


@pytest.mark.parametrize("layers", [0, 4])
def test_layers_that_the_encoder_lacks_are_refused(encoder, layers):
    with pytest.raises(ValueError, match=f"layers is {layers}: the encoder has 3"):
        probe.pooled_features(encoder, [torch.randn(1, 3, 16, 16)], layers=layers)


def test_no_images_are_refused(encoder):
    with pytest.raises(ValueError, match="no images"):
        probe.pooled_features(encoder, [])


# ----------------------------------------------------------------------------------- neighbours


def knn_oracle(train_x, train_y, x, k, temperature, classes):
    """By the definition, in double precision: a stable sort, and sums over neighbours."""
    a, b = (v.double().numpy() for v in (x, train_x))
    a /= np.linalg.norm(a, axis=1, keepdims=True)
    b /= np.linalg.norm(b, axis=1, keepdims=True)
    similarity = a @ b.T
    neighbours = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    similarity = np.take_along_axis(similarity, neighbours, axis=1)
    votes = np.zeros((2, len(a), classes))
    for i in range(len(a)):
        for j, s in zip(neighbours[i], similarity[i], strict=True):
            votes[0, i, train_y[j]] += np.exp(s / temperature)
            votes[1, i, train_y[j]] += 1
    return votes[0].argmax(1), votes[1].argmax(1), neighbours, similarity


@pytest.mark.parametrize(
    ("k", "temperature"), [(1, 0.07), (7, 0.07), (20, 0.07), (20, 0.01), (20, 0.5), (300, 0.07)]
)
def test_knn_equals_numpy(k, temperature):
    train_x, x = torch.randn(300, 8) * 5, torch.randn(70, 8)
    train_y = torch.randint(6, (300,))
    got = probe.knn(train_x, train_y, x, k=k, temperature=temperature)
    weighted, plain, neighbours, similarity = knn_oracle(train_x, train_y, x, k, temperature, 6)
    assert got.weighted.tolist() == weighted.tolist()
    assert got.plain.tolist() == plain.tolist()
    assert got.neighbours.tolist() == neighbours.tolist()
    np.testing.assert_allclose(got.similarity, similarity, atol=1e-6)
    if k == 20:
        assert (weighted != plain).any()  # or the two would not be told apart


def test_plain_votes_equal_scikit_learn():
    train_x, train_y, x = torch.randn(400, 5), torch.randint(4, (400,)), torch.randn(100, 5)
    oracle = KNeighborsClassifier(8, metric="cosine", algorithm="brute").fit(train_x, train_y)
    assert probe.knn(train_x, train_y, x, k=8).plain.tolist() == oracle.predict(x).tolist()


@pytest.mark.parametrize("chunks", [(1, 300), (64, 64), (7, 11), (1000, 1000)])
def test_knn_does_not_depend_on_chunks(chunks):
    train_x, train_y, x = torch.randn(300, 8), torch.randint(6, (300,)), torch.randn(50, 8)
    whole = probe.knn(train_x, train_y, x)
    parts = probe.knn(train_x, train_y, x, chunk=chunks[0], train_chunk=chunks[1])
    for a, b in zip(whole[:3], parts[:3], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(whole.similarity, parts.similarity, atol=1e-6, rtol=0)


@pytest.mark.parametrize("train_chunk", [5, 6, 16, 100])
def test_of_equally_near_images_the_first_count(train_chunk):
    # Unit vectors along axes: similarities are exactly 0 or 1, and most of them tie.
    train_x = torch.eye(4).repeat(4, 1)  # rows 0, 4, 8, 12 are the same vector
    train_y = torch.arange(16)
    got = probe.knn(train_x, train_y, torch.eye(4) * 3, k=6, train_chunk=train_chunk)
    assert got.neighbours[0].tolist() == [0, 4, 8, 12, 1, 2]
    assert got.neighbours[2].tolist() == [2, 6, 10, 14, 0, 1]
    assert got.plain.tolist() == [0, 0, 0, 0]  # six classes with a vote each: the lowest
    assert got.weighted.tolist() == [0, 1, 2, 3]  # the lowest of the four near ones


def test_equally_near_images_stand_in_their_order_where_none_is_left_out():
    train_x = torch.zeros(1000, 2)
    near = torch.randperm(1000)[:60]
    train_x[:, 1], train_x[near, 1], train_x[near, 0] = 1.0, 0.0, 1.0
    got = probe.knn(train_x, torch.zeros(1000, dtype=torch.int64), torch.eye(2)[:1], k=60)
    assert got.neighbours[0].tolist() == sorted(near.tolist())


def test_collapsed_features_have_the_first_images_as_neighbours():
    got = probe.knn(torch.ones(50, 3), torch.arange(50) % 5, torch.ones(2, 3), k=10, train_chunk=20)
    assert got.neighbours.tolist() == [list(range(10))] * 2


def test_a_small_temperature_does_not_overflow():
    train_x, train_y = torch.randn(40, 3), torch.arange(40)
    got = probe.knn(train_x, train_y, train_x, k=5, temperature=1e-4)
    assert got.weighted.tolist() == train_y.tolist()  # everyone is nearest to itself


def test_knn_refuses_what_it_cannot_answer():
    x, y = torch.randn(10, 4), torch.zeros(10, dtype=torch.int64)
    with pytest.raises(ValueError, match="11 neighbours asked of 10"):
        probe.knn(x, y, x, k=11)
    with pytest.raises(ValueError, match="width 4 and 3"):
        probe.knn(x, y, x[:, :3], k=1)
    with pytest.raises(ValueError, match="10 images, but labels of shape"):
        probe.knn(x, y[:9], x, k=1)
    with pytest.raises(ValueError, match="label 3, but there are only 2"):
        probe.knn(x, y + 3, x, k=1, num_classes=2)
    x[[3, 5], 1] = float("nan")
    with pytest.raises(ValueError, match="training set: the features of 2 of 10"):
        probe.knn(x, y, torch.randn(3, 4), k=1)
    with pytest.raises(ValueError, match="to classify: the features of 2 of 10"):
        probe.knn(torch.randn(10, 4), y, x, k=1)


# --------------------------------------------------------------------------------- linear probe


def blobs(n, width, classes, distance, seed=0):
    """Gaussian clouds with a covariance as uneven as that of real features, off the origin."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centres = torch.randn(classes, width, generator=g) * distance
    x = centres[y] + torch.randn(n, width, generator=g)
    scales = torch.logspace(0, -3, width)
    turn = torch.linalg.qr(torch.randn(width, width, generator=g)).Q
    return (x * scales) @ turn + 5 * torch.randn(width, generator=g), y


def thirds(x, y):
    n = len(x) // 3
    return x[:n], y[:n], x[n : 2 * n], y[n : 2 * n], x[2 * n :], y[2 * n :]


def test_separable_data_give_all():
    result = probe.linear_probe(*thirds(*blobs(1500, 20, 5, distance=5.0)))
    assert result.best.val_mean > 0.995
    assert result.best.test_mean > 0.995


def test_shuffled_labels_give_chance():
    x, y = blobs(6000, 20, 5, distance=5.0)
    result = probe.linear_probe(*thirds(x, y[torch.randperm(len(y))]))
    # 20 % of 2,000 has a standard deviation of 0.9 points. Validation is the best of 20 settings.
    assert abs(result.best.test_mean - 0.2) < 0.035
    assert abs(result.best.val_mean - 0.2) < 0.045


def scikit_learn(train_x, train_y, head, decay):
    """The optimum by Newton's method, for features prepared as each head has them."""
    mean, std = train_x.mean(0), train_x.std(0, correction=0)
    scale = std if head == "bn" else std.square().mean().sqrt()
    oracle = LogisticRegression(
        C=1 / (decay * len(train_x)), solver="newton-cholesky", max_iter=100, tol=1e-8
    ).fit(((train_x - mean) / scale).double(), train_y)
    return lambda x: torch.from_numpy(oracle.predict_proba(((x - mean) / scale).double().numpy()))


@pytest.mark.parametrize("head", probe.HEADS)
@pytest.mark.parametrize("decay", [1e-5, 1e-3, 1e-1])
def test_whole_batches_converge_to_the_optimum_of_scikit_learn(head, decay):
    x, y = blobs(800, 20, 5, distance=0.35)
    choice = probe.linear_probe(
        x, y, x, y, heads=[head], rates=[0.3], decays=[decay], seeds=1, min_steps=1500
    ).best
    ours = (x @ choice.weight[0].T + choice.bias[0]).softmax(1)
    oracle = scikit_learn(x, y, head, decay)(x)
    assert (oracle.max(1).values - 1 / 5).mean() > 0.1  # not just "I do not know"
    torch.testing.assert_close(ours.double(), oracle, atol=2e-3, rtol=0)


def test_small_batches_come_to_rest_near_the_optimum():
    x, y = blobs(800, 20, 5, distance=0.35)
    choice = probe.linear_probe(
        x, y, x, y, heads=["bn"], rates=[0.1], decays=[1e-3], seeds=1, batch_size=100, epochs=60
    ).best
    ours = (x @ choice.weight[0].T + choice.bias[0]).softmax(1)
    error = (ours - scikit_learn(x, y, "bn", 1e-3)(x)).abs().mean()
    assert error < 0.001  # at a constant rate it stays at 0.006


@pytest.mark.parametrize("head", probe.HEADS)
def test_the_default_sweep_is_within_half_a_point_of_scikit_learn(head):
    x, y = blobs(12_000, 20, 5, distance=0.35)
    train_x, train_y, val_x, val_y = x[:2000], y[:2000], x[2000:], y[2000:]
    oracle = []
    for decay in probe.DECAYS:
        probabilities = scikit_learn(train_x, train_y, head, decay or 1e-9)(val_x)
        oracle.append((probabilities.argmax(1) == val_y).double().mean().item())
    assert max(oracle) - min(oracle) > 0.05  # the decay matters here
    result = probe.linear_probe(train_x, train_y, val_x, val_y, heads=[head])
    # To stop early, at a low rate, can be better than any penalty: not more than that.
    assert -0.005 < result.best.val_mean - max(oracle) < 0.01
    for row in result.grid:
        if row.rate == 0.3:
            assert abs(probe.mean_std(row.val)[0] - oracle[probe.DECAYS.index(row.decay)]) < 0.005


def test_heads_are_different_models():
    train_x, train_y, val_x, val_y, _, _ = thirds(*blobs(3000, 20, 5, distance=0.5))
    # Dimensions of very different size, which only batch norm makes equal.
    stretch = torch.logspace(0, -2, 20)
    result = probe.linear_probe(
        train_x * stretch, train_y, val_x * stretch, val_y, rates=[0.3], decays=[1e-2]
    )
    accuracy = {row.head: probe.mean_std(row.val)[0] for row in result.grid}
    plain = probe.linear_probe(
        train_x, train_y, val_x, val_y, heads=["bn"], rates=[0.3], decays=[1e-2]
    )
    assert accuracy["bn"] > accuracy["linear"] + 0.02
    assert abs(accuracy["bn"] - plain.best.val_mean) < 0.005  # blind to the stretch


def test_the_features_scale_and_offset_do_not_matter():
    train_x, train_y, val_x, val_y, _, _ = thirds(*blobs(1500, 12, 4, distance=0.5))
    options = {"rates": [0.1], "decays": [0.0, 1e-2], "seeds": 2}
    grids = [
        probe.linear_probe(a * train_x + b, train_y, a * val_x + b, val_y, **options).grid
        for a, b in ((1, 0), (1000, 0), (0.01, 3))
    ]
    for rows in zip(*grids, strict=True):
        values = [row.val for row in rows]
        np.testing.assert_allclose(values, [values[0]] * 3, atol=2.5 / len(val_y))


def test_a_member_of_the_grid_equals_itself_alone():
    train_x, train_y, val_x, val_y, test_x, test_y = thirds(*blobs(900, 12, 4, distance=0.5))
    data = [
        {"narrow": x[:, :5], "wide": x} if x.ndim == 2 else x
        for x in (train_x, train_y, val_x, val_y, test_x, test_y)
    ]
    options = {"epochs": 4, "min_steps": 1, "batch_size": 100}
    grid = probe.linear_probe(
        *data, rates=[0.03, 0.3], decays=[0.0, 1e-2], seeds=[3, 4, 5], **options
    )
    assert len(grid.grid) == 2 * 2 * 2 * 2
    weights = []
    for head, rate, decay in (("linear", 0.3, 0.0), ("bn", 0.03, 1e-2)):
        alone = probe.linear_probe(
            train_x, train_y, val_x, val_y, heads=[head], rates=[rate], decays=[decay], seeds=[4],
            **options,
        )  # fmt: skip
        (row,) = (row for row in grid.grid if row[:4] == ("wide", head, rate, decay))
        assert row.val[1] == alone.best.val[0]
        weights.append(alone.best.weight[0])
        # The same, but in the company of everything else.
        company = probe.linear_probe(
            *data, rates=[rate], decays=[decay], heads=[head], seeds=[3, 4], **options
        )
        torch.testing.assert_close(
            company.by_feature["wide"].weight[1], weights[-1], atol=1e-4, rtol=1e-4
        )
    assert (weights[0] - weights[1]).abs().max() > 0.1


def test_seeds_repeat_and_differ():
    data = thirds(*blobs(900, 12, 4, distance=0.3))
    options = {"rates": [0.3], "decays": [0.0], "heads": ["linear"], "batch_size": 50}
    first, again = (probe.linear_probe(*data, seeds=3, **options).best for _ in range(2))
    assert torch.equal(first.weight, again.weight)
    assert first.val == again.val and first.test == again.test
    assert not torch.equal(first.weight[0], first.weight[1])
    assert len(first.val) == len(first.test) == 3


def test_evaluation_does_not_depend_on_the_chunk(monkeypatch):
    data = thirds(*blobs(900, 12, 4, distance=0.3))
    found = []
    for chunk in (7, 10_000):
        monkeypatch.setattr(probe, "CHUNK", chunk)
        found.append(probe.linear_probe(*data, rates=[0.1], min_steps=50))
    parts, whole = found
    assert whole.grid == parts.grid
    assert whole.best.test == parts.best.test


def test_the_choice_is_the_best_on_validation_and_blind_to_the_test_set():
    train_x, train_y, val_x, val_y, test_x, test_y = thirds(*blobs(1200, 12, 4, distance=0.3))
    noise = [torch.randn_like(x) for x in (train_x, val_x, test_x)]
    features = [
        {"noise": z, "real": x} for z, x in zip(noise, (train_x, val_x, test_x), strict=True)
    ]
    labels = [test_y, (test_y + 1) % 4, None]
    results = [
        probe.linear_probe(
            features[0], train_y, features[1], val_y, None if y is None else features[2], y
        )
        for y in labels
    ]
    means = [probe.mean_std(row.val)[0] for row in results[0].grid]
    best = results[0].grid[means.index(max(means))]
    assert max(means) - min(means) > 0.1  # there is something to choose
    for result in results:
        assert result.grid == results[0].grid
        assert tuple(best) == tuple(getattr(result.best, name) for name in best._fields)
        assert result.best is result.by_feature["real"]
        assert set(result.by_feature) == {"noise", "real"}
    assert results[0].best.test_mean > 0.5 > results[1].best.test_mean
    assert results[2].best.test == () and results[2].best.predictions is None


def test_predictions_and_weights_are_those_of_the_score():
    data = thirds(*blobs(900, 12, 4, distance=0.4))
    for choice in (
        probe.linear_probe(*data, heads=[head], rates=[0.1], decays=[1.0, 1e-3], batch_size=30).best
        for head in probe.HEADS
    ):
        assert choice.decay == 1e-3  # not the first setting, which predicts something else
        hits = (choice.predictions == data[5]).double().mean(1)
        assert choice.test == tuple(hits.tolist())
        assert choice.test_mean == pytest.approx(hits.mean().item())
        assert choice.test_std == pytest.approx(hits.std().item()) and choice.test_std > 0
        logits = torch.einsum("scd,nd->snc", choice.weight, data[4]) + choice.bias[:, None]
        assert (logits.argmax(2) == choice.predictions).double().mean() > 0.995


def test_fewer_images_than_dimensions_and_features_that_do_not_vary():
    x, y = blobs(120, 50, 3, distance=3.0)
    x[:, 7] = 2.0
    assert probe.linear_probe(x[:30], y[:30], x[30:], y[30:]).best.val_mean > 0.9
    result = probe.linear_probe(torch.ones_like(x), y, torch.ones_like(x), y, min_steps=20)
    assert result.best.val_mean == pytest.approx(1 / 3)
    assert result.best.weight.isfinite().all()


def test_linear_probe_refuses_what_it_cannot_answer():
    x, y = torch.randn(30, 4), torch.arange(30) % 3
    refused = [
        ((x, y, {"other": x}, y), {}, r"validation features \['other'\]"),
        ((x, y, x[:, :3], y), {}, "width 3, not 4"),
        ((x, y[:9], x, y), {}, "30 images, but labels"),
        ((x, y, x, y, x), {}, "a test set needs"),
        ((x, y, x, y), {"num_classes": 2}, "label 2, but there are only 2 classes"),
        ((x, y - 1, x, y), {}, "whole numbers from 0"),
        ((x, y, x, y), {"heads": ["mlp"]}, "unknown head 'mlp'"),
        ((x, y, x, y), {"rates": []}, "empty grid"),
        ((x, y, x, y), {"seeds": 0}, "empty grid"),
        ((x, y, x, y), {"epochs": 0}, "must be positive"),
    ]
    for arguments, options, message in refused:
        with pytest.raises(ValueError, match=message):
            probe.linear_probe(*arguments, **options)
    bad = x.clone()
    bad[:2] = float("nan")
    with pytest.raises(ValueError, match=r"validation set, features: the features of 2 of 30"):
        probe.linear_probe(x, y, bad, y)


# --------------------------------------------------------------------------- health and mistakes


def test_rankme_counts_directions():
    turn = torch.linalg.qr(torch.randn(200, 40)).Q  # 40 orthonormal columns: all used alike
    assert probe.rankme(turn) == pytest.approx(40, abs=0.01)
    assert probe.rankme(turn.T) == pytest.approx(40, abs=0.01)  # fewer images than dimensions
    assert probe.rankme(torch.outer(torch.randn(100), torch.randn(30))) == pytest.approx(
        1, abs=0.001
    )
    assert probe.rankme(torch.zeros(5, 3)) == pytest.approx(1, abs=0.001)
    # Two directions with singular values 3 to 1, by hand: exp(H(0.75, 0.25)).
    x = torch.zeros(10, 4)
    x[0, 0], x[1, 1] = 3.0, 1.0
    by_hand = np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert probe.rankme(x) == pytest.approx(by_hand, abs=1e-4)


@pytest.mark.parametrize("shape", [(500, 60), (60, 200), (40_000, 8)])
def test_rankme_equals_the_definition_by_svd(shape):
    x = torch.randn(shape) * torch.logspace(0, -5, shape[1]) + 0.1  # uneven, and not centred
    sigma = np.linalg.svd(x.double().numpy(), compute_uv=False)
    p = sigma / sigma.sum() + 1e-7
    assert probe.rankme(x) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)
    for scale in (1e-6, 1e6):
        assert probe.rankme(x * scale) == pytest.approx(probe.rankme(x), rel=1e-5)


def test_feature_std_is_that_of_vectors_of_length_one():
    x = torch.randn(5000, 64)
    unit = x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True)
    assert probe.feature_std(x) == pytest.approx(unit.std(0).mean())
    assert probe.feature_std(x) == pytest.approx(1 / 8, rel=0.01)  # 1 / sqrt(D)
    assert probe.feature_std(torch.arange(1.0, 9)[:, None] * x[0]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("measure", [probe.rankme, probe.feature_std])
def test_health_figures_refuse_what_is_not_finite(measure):
    x = torch.randn(10, 4)
    x[3, 2] = float("inf")
    with pytest.raises(ValueError, match="1 of 10"):
        measure(x)
    with pytest.raises(ValueError, match="must be"):
        measure(torch.zeros(0, 4))


def test_confusion_counts_true_by_predicted():
    true, predicted = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 0, 2, 2])
    expected = [[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0]]
    assert probe.confusion(true, predicted, 4).tolist() == expected
    with pytest.raises(ValueError, match="of only 2"):
        probe.confusion(true, predicted, 2)
    with pytest.raises(ValueError, match="of only 4"):
        probe.confusion(true, predicted - 1, 4)
    with pytest.raises(ValueError, match="labels"):
        probe.confusion(true, predicted[:3], 4)
