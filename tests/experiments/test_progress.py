import sys

import pytest

from experiments import plots, progress


class Clock:
    time = 0.0

    def __call__(self) -> float:
        return self.time


def test_chrono_leaves_out_compilation_and_pauses_and_goes_on_after_a_restart():
    clock = Clock()
    chrono = progress.Chrono(now=clock)
    clock.time = 100.0  # compiles
    chrono.step()
    assert chrono.interval() is None and chrono.seconds_per_step is None
    for clock.time in (102.0, 104.0):
        chrono.step()
    with chrono.pause():  # evaluates
        clock.time = 150.0
    clock.time = 155.0
    chrono.step()
    assert chrono.interval() == (3.0, 0.0) and chrono.seconds_per_step == 3.0
    clock.time = 156.0
    chrono.step()
    assert (chrono.interval(), chrono.seconds_per_step, chrono.seconds) == ((1.0, 0.0), 2.5, 156.0)

    later = Clock()
    restarted = progress.Chrono(chrono.state(), devices=4, now=later)
    later.time = 30.0
    restarted.step()
    later.time = 40.0
    restarted.step()
    assert (restarted.seconds, restarted.interval(), restarted.seconds_per_step) == (196.0, (10.0, 0.0), 4.0)
    assert restarted.device_seconds == 156 + 4 * 40


def test_waiting_is_a_share_of_the_interval():
    """The first wait lies before the first step's end, where no time is taken yet."""
    clock = Clock()
    chrono = progress.Chrono(now=clock)
    for wait, work in ((50.0, 1.0), (1.0, 3.0), (2.0, 2.0)):
        with chrono.waiting():
            clock.time += wait
        clock.time += work
        chrono.step()
    assert chrono.interval() == (4.0, 100 * 3 / 8)
    clock.time += 5.0
    chrono.step()
    assert chrono.interval() == (5.0, 0.0)


@pytest.mark.parametrize(
    ("seconds", "face"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (3725, "1:02:05"), (90000, "25:00:00")]
)
def test_clock_face(seconds, face):
    assert progress.clock_face(seconds) == face


LINE = {"step": 40, "loss": 0.51234, "accuracy": 81.25, "gradient_norm": 3.0, "seconds": 9.0}
LINE |= {"tokens_per_second": 2000, "waiting_percent": 1.25}


def test_plain_lines(capsys):
    """60 steps of 1,000 tokens are left, at 2,000 tokens a second."""
    with progress.Display(100, 0, 1000) as display:
        display.step(39)
        display.log(LINE)
        display.log({"step": 40, "test/loss": 0.6, "test/accuracy": 80.0, "seconds": 9.1})
    assert capsys.readouterr().err.splitlines() == [
        "step 40/100  loss 0.5123  accuracy 81.25  2,000 tokens/s  waiting 1.2 %  ETA 0:00:30",
        "step 40/100  test/loss 0.6  test/accuracy 80",
    ]


def test_live_line_on_a_terminal(capsys, monkeypatch):
    """Training lines replace each other; a line of an evaluation stays."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "170")
    with progress.Display(100, 0, 1000) as display:
        display.log({"step": 20, "test/loss": 0.7, "test/accuracy": 75.0})
        display.log(LINE)
        display.step(41)
    err = capsys.readouterr().err
    assert "step 20  test/loss 0.7  test/accuracy 75\n" in err
    assert "41/100" in err and "loss 0.5123  accuracy 81.25  2,000 tokens/s  waiting 1.2 %  ETA 0:00:30" in err


def test_tensorboard_holds_every_scalar(tmp_path):
    from tensorboardX.proto import event_pb2

    with progress.TensorBoard(tmp_path, start=30) as board:
        board.log(LINE)
    (file,) = tmp_path.iterdir()
    content, events = file.read_bytes(), []
    while content:
        size = int.from_bytes(content[:8], "little")
        events.append(event_pb2.Event.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    scalars = {v.tag: v.simple_value for e in events for v in e.summary.value if e.step == 40}
    assert scalars == pytest.approx({k: v for k, v in LINE.items() if k != "step"})
    assert any(e.session_log.status == event_pb2.SessionLog.START and e.step == 31 for e in events)


def test_curves_draw_every_point(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **more: drawn.append((x, y)) or plot(self, x, y, **more))
    levels = []
    monkeypatch.setattr(Axes, "axhline", lambda self, y, **more: levels.append(y))
    lines = [LINE, {"step": 40, "test/loss": 0.6, "test/accuracy": 80.0}, LINE | {"step": 80, "loss": 0.25}]
    published = {"value": 99.0, "source": "paper"}
    plots.curves(tmp_path / "curves.png", lines, title="t", metric="accuracy", published=published)
    assert drawn == [((40, 80), (0.51234, 0.25)), ((40,), (0.6,)), ((40, 80), (81.25, 81.25)), ((40,), (80.0,))]
    assert levels == [99.0]
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]
