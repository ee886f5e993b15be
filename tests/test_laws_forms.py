"""Laws against their formulas written out again, and Jacobians against central differences."""

import numpy as np
import pytest
from laws_cases import TRUTH, chinchilla_rows, covariate_table, plain_loss

from qpipe.errors import QpipeError
from qpipe.laws import LAWS, get_law
from qpipe.laws.model import Model
from qpipe.laws.parameters import parse_priors, parse_settings, with_fixed
from qpipe.laws.prepare import make_design


def bound(law: str) -> tuple[Model, np.ndarray]:
    """The law on the covariate table, with the true parameters as an internal vector."""
    table = covariate_table()
    table = table[table["representation"] == "dense"] if law == "chinchilla" else table
    design = make_design(table, LAWS[law])
    model = Model(LAWS[law], design, LAWS[law].parameters(design))
    natural = np.array([TRUTH[law][name] for name in model.names])
    logs = np.array([p.transform == "log" for p in model.parameters])
    counts = np.where(logs, np.log(np.where(logs, natural, 1.0)), natural)
    return model, model.shift(counts, to_counts=False)[None]


@pytest.mark.parametrize("law", LAWS)
def test_predictions_equal_the_printed_formula(law: str) -> None:
    model, theta = bound(law)
    table = covariate_table()
    table = table[table["representation"] == "dense"] if law == "chinchilla" else table
    expected = plain_loss(law, TRUTH[law], table)
    np.testing.assert_allclose(model.predict(theta)[0], expected, rtol=1e-12)
    np.testing.assert_allclose(model.linearise(theta)[0][0], expected, rtol=1e-12)


@pytest.mark.parametrize("law", LAWS)
def test_jacobian_equals_central_differences(law: str) -> None:
    model, theta = bound(law)
    _, jacobian, grouped = model.linearise(theta)
    for position, name in enumerate(model.names):
        step = np.zeros_like(theta)
        step[0, position] = 1e-5
        numeric = (model.predict(theta + step)[0] - model.predict(theta - step)[0]) / 2e-5
        if position < model.shared:
            analytic = jacobian[0, position]
        else:
            assert grouped is not None
            analytic = np.where(model.members == position - model.shared, grouped[0], 0.0)
        np.testing.assert_allclose(analytic, numeric, rtol=1e-6, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("law", ["compression", "capacity", "sparsity", "precision"])
def test_multiplier_is_the_size_of_the_equally_good_dense_model(law: str) -> None:
    model, theta = bound(law)
    table = covariate_table().assign(ptq_bits=0.0)
    eff = model.size_multiplier(theta)[0]
    parameters = dict(TRUTH[law])
    dense = parameters["A"] * (table["n"] * eff) ** -0.25 + 800.0 * table["d"] ** -0.32 + 1.6
    np.testing.assert_allclose(dense, plain_loss(law, parameters, table), rtol=1e-12)


def test_a_wrong_law_name_gets_the_nearest_one() -> None:
    with pytest.raises(QpipeError, match=r"did you mean 'compression'"):
        get_law("compresion")


def test_settings_and_priors_are_parsed_or_refused_all_at_once() -> None:
    assert parse_settings(["alpha=0.13", "eff[w4]=.9"], "--fix") == {"alpha": 0.13, "eff[w4]": 0.9}
    assert parse_priors(["E=1.7+-0.2"])[0].sd == pytest.approx(0.2)
    with pytest.raises(QpipeError) as caught:
        parse_settings(["alpha", "E=high", "E=nan"], "--fix")
    assert len(caught.value.problems) >= 3
    with pytest.raises(QpipeError, match="must be positive"):
        parse_priors(["E=1.7+-0"])


def test_held_parameters_must_exist_and_lie_within_bounds() -> None:
    design = make_design(chinchilla_rows(20), LAWS["chinchilla"])
    parameters = LAWS["chinchilla"].parameters(design)
    with pytest.raises(QpipeError) as caught:
        with_fixed(parameters, {"alhpa": 0.3, "beta": -1.0})
    assert "did you mean 'alpha'" in caught.value.problems[0]
    assert "outside its bounds" in caught.value.problems[1]
