"""scikit-learn classifiers, and plain Python functions, as black boxes that give scores."""

import numpy as np
import pytest
import torch
from needs import framework

import assay
from assay.core.errors import ModelError, ModelOutputError
from assay.models.bridges.function import from_function
from assay.models.fingerprint import fingerprint

framework("sklearn")
joblib = framework("joblib")

from sklearn.ensemble import RandomForestClassifier  # noqa: E402
from sklearn.linear_model import LinearRegression, LogisticRegression  # noqa: E402
from sklearn.multioutput import MultiOutputClassifier  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402
from sklearn.svm import SVC, LinearSVC  # noqa: E402


@pytest.fixture(scope="module")
def digits():
    """Images (n, 1, 28, 28) and labels of two digits that ship, 0 and 1."""
    data = assay.load_data("demo:mnist", limit=600)
    rows = torch.arange(600)[data.labels < 2]
    return data.batch(rows), data.labels[rows]


def fitted(model, digits, names=(0, 1)):
    x, y = digits
    return model.fit(x.flatten(1).numpy(), np.array(names)[y.numpy()])


PROBABLE = {
    "linear": LogisticRegression,
    "pipeline": lambda: make_pipeline(StandardScaler(), LogisticRegression()),
    "forest": lambda: RandomForestClassifier(10, random_state=0),
}


@pytest.mark.parametrize("kind", PROBABLE)
def test_the_logits_are_logarithms_of_the_probabilities(digits, kind):
    model, (x, _) = fitted(PROBABLE[kind](), digits), digits
    m = assay.Model(model)
    wanted = torch.tensor(model.predict_proba(x.flatten(1).double().numpy()))
    torch.testing.assert_close(m(x).exp(), wanted, atol=1e-9, rtol=0)
    assert m.class_names == ("0", "1")
    assert any("without gradients" in n for n in m.notes)


def test_attacks_by_scores_work(digits):
    x, y = digits[0][:8], digits[1][:8]
    m = assay.Model(fitted(LogisticRegression(), digits))
    r = assay.attacks.Square(steps=100)(m, x, y, assay.Threat("linf", 0.5))
    assert r.success.any()
    assert (m(r.x).argmax(1) != y)[r.success].all()
    assert (r.backwards == 0).all()


@pytest.mark.slow
def test_the_verdict_is_one_by_scores(digits):
    x, y = digits[0][:8], digits[1][:8]
    m = assay.Model(fitted(LogisticRegression(), digits))
    e = assay.evaluate(m, (x, y), "linf:0.5", effort="quick", progress=False)
    assert "no-gradient" in [f.code for f in e.findings]
    assert e.clean_accuracy == 1
    assert e.robust_accuracy < 0.5


def test_a_decision_function_will_do(digits):
    x, y = digits
    two = assay.Model(fitted(LinearSVC(), digits))
    assert (two(x).argmax(1) == y).float().mean() > 0.99
    many = fitted(SVC(), (x, torch.arange(len(x)) % 3), names=(0, 1, 2))
    m = assay.Model(many)
    torch.testing.assert_close(m(x), torch.tensor(many.decision_function(x.flatten(1).numpy())))
    assert not m.probabilities


def test_classes_that_are_no_numbers_from_0_are_named_in_their_order(digits):
    m = assay.Model(fitted(LogisticRegression(), digits, names=("zebra", "ant")))
    assert m.class_names == ("ant", "zebra")
    assert any("ant, zebra" in n for n in m.notes)


def test_samples_that_do_not_fit_are_refused_by_both_shapes(digits):
    m = assay.Model(fitted(LogisticRegression(), digits))
    with pytest.raises(ModelError, match=r"\(784,\).*\(1, 8, 8\)"):
        m(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ModelError, match=r"\(784,\).*\(4, 14, 14\).*Flatten the images yourself"):
        m(torch.zeros(2, 4, 14, 14))


@pytest.mark.parametrize("kind", ["not fitted", "regressor", "several outputs"])
def test_what_is_no_fitted_classifier_is_refused(digits, kind):
    x, y = digits
    model = {
        "not fitted": LogisticRegression,
        "regressor": lambda: fitted(LinearRegression(), digits),
        "several outputs": lambda: MultiOutputClassifier(LogisticRegression()).fit(x.flatten(1), np.stack([y, y], 1)),
    }[kind]()
    with pytest.raises(ModelError, match="fitted classifier"):
        assay.Model(model)


def test_a_file_is_unpickled_only_if_it_is_trusted(tmp_path, digits):
    model, (x, _) = fitted(LogisticRegression(), digits), digits
    joblib.dump(model, tmp_path / "model.joblib")
    with pytest.raises(ModelError, match="trust-pickle"):
        assay.load_model(tmp_path / "model.joblib")
    m = assay.load_model(tmp_path / "model.joblib", trust_pickle=True)
    torch.testing.assert_close(m(x), assay.Model(model)(x))
    assert m.net.digest == assay.Model(model).net.digest
    (tmp_path / "bad.joblib").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="joblib"):
        assay.load_model(tmp_path / "bad.joblib", trust_pickle=True)


# Plain functions


def test_a_plain_function_is_a_model_and_never_sees_our_memory():
    def scores(x):
        x *= 2
        return np.stack([x.sum((1, 2, 3)), -x.sum((1, 2, 3))], 1)

    x = torch.rand(4, 3, 5, 5)
    before = x.clone()
    z = assay.Model(from_function(scores, 2))(x)
    torch.testing.assert_close(z[:, 0], 2 * x.sum((1, 2, 3)))
    assert (x == before).all()


def test_labels_become_scores():
    m = assay.Model(from_function(lambda x: (x[:, 0] > 0.5).astype(int) * 2, 3))
    assert m(torch.tensor([[0.1], [0.9]])).tolist() == [[1, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("out", [np.zeros((4, 2)), np.array([0, 1, 2, 3]), np.zeros(4)])
def test_what_is_neither_is_refused(out):
    with pytest.raises(ModelOutputError, match=r"scores \(4, 3\), or labels \(4,\) from 0 to 2"):
        from_function(lambda _: out, 3)(torch.zeros(4, 1))


def test_the_fingerprint_of_a_function_is_that_of_its_code_and_of_what_it_holds():
    def made(w):
        return lambda x: x @ w

    a, b = np.eye(2), 2 * np.eye(2)
    one, again, other = (fingerprint(assay.Model(from_function(made(w), 2))) for w in (a, a.copy(), b))
    assert one == again != other
    assert fingerprint(assay.Model(from_function(lambda x: x + 1, 2))) != one
