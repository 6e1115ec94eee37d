"""Float64 NumPy definitions, one token after another, and the bounds that everything is held to."""

import numpy as np
import scipy.linalg


def relative(out, ref) -> float:
    """||out - ref|| / ||ref||."""
    out, ref = np.asarray(out), np.asarray(ref)
    assert out.shape == ref.shape, f"{out.shape} against {ref.shape}"
    scale = np.linalg.norm(ref)
    return float(np.linalg.norm(out - ref) / (scale if scale else 1))


def assert_close(out, ref, *, scale: float = 1, label: str = "", gradient: bool = False) -> None:
    """Relative error within float64 1e-12, float32 2e-6 sqrt(scale) or bfloat16 8e-3; four times that for gradients."""
    dtype = np.asarray(out).dtype
    name = {"complex64": "float32", "complex128": "float64"}.get(dtype.name, dtype.name)
    bound = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 8e-3}[name] * max(1, scale) ** 0.5 * (4 if gradient else 1)
    error = relative(np.asarray(out, np.result_type(dtype, np.float32)), ref)
    assert error <= bound, f"{label} differs by {error:.2e}; the bound is {bound:.2e}"


def dense_rule(rule: str, A: np.ndarray, dt: float, w: float = 0.5) -> tuple[np.ndarray, ...]:
    """(decay, previous, current) as matrices, from the definition of each rule by scipy's expm and solves."""
    eye, zero = np.eye(len(A)), np.zeros_like(A)
    if rule in ("bilinear", "generalized_bilinear", "forward_euler", "backward_euler"):
        w = {"bilinear": 0.5, "forward_euler": 0.0, "backward_euler": 1.0}.get(rule, w)
        inverse = np.linalg.inv(eye - w * dt * A)
        return inverse @ (eye + (1 - w) * dt * A), zero, dt * inverse
    decay = scipy.linalg.expm(dt * A)
    if rule == "zoh":
        return decay, zero, np.linalg.solve(A, decay - eye)
    if rule == "exponential_trapezoidal":
        return decay, (1 - w) * dt * decay, w * dt * eye
    return decay, zero, eye if rule == "dirac" else dt * eye


def dense_ssm(decay, previous, current, B, C, D, u_ld, h=None):
    """(y_lp, h) of h_t = decay h + previous B u_{t-1} + current B u_t and y_t = C h_t + D u_t, in a loop."""
    h = np.zeros(len(decay), decay.dtype) if h is None else h
    v, y = np.zeros(len(decay), decay.dtype), []
    for u in u_ld:
        v_before, v = v, B @ u
        h = decay @ h + previous @ v_before + current @ v
        y.append(C @ h + D @ u)
    return np.stack(y), h


def scan(a_bln, b_bln, h_bn, reverse=False):
    """h_t = a_t h_{t-1} + b_t in a loop: (states, last)."""
    order = range(b_bln.shape[1])[:: -1 if reverse else 1]
    states, h = np.zeros(b_bln.shape, np.result_type(a_bln, b_bln)), h_bn
    for t in order:
        states[:, t] = h = a_bln[:, t] * h + b_bln[:, t]
    return states, h


def with_conjugates(x, axis=-1):
    """Kept halves of conjugate pairs, completed."""
    return np.concatenate([x, np.conj(x)], axis)
