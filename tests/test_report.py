"""Trace files and timeline pictures."""

import itertools
import json
import subprocess
import sys
from collections import Counter, defaultdict

import pytest
import torch
from torch import nn

import pipeline_ext as pe
from pipeline_ext.plan import records
from pipeline_ext.report import perfetto

SPLIT = [["0F0", "0F1", "0I0", "0W0", "0I1", "0W1"], ["1F0", "1I0", "1F1", "1I1", "1W0", "1W1"]]


def ran(schedule, stages, microbatches, **options):
    """The trace of a small step."""
    modules = [nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(stages)]
    with pe.Pipeline(
        modules, microbatches=microbatches, schedule=schedule, loss_fn=lambda out: out.sum(), **options
    ) as pipe:
        pipe.step(torch.randn(8 * microbatches, 64))
        return pipe.trace


@pytest.fixture(params=["1f1b", "overlap", "interleaved", "csv"])
def trace(request, tmp_path):
    if request.param == "1f1b":
        return ran("1f1b", 3, 5, reactive=False)
    if request.param == "overlap":
        return ran("1f1b", 2, 4, overlap=True)
    if request.param == "interleaved":
        return ran("interleaved-1f1b", 4, 4, devices=["cpu"] * 2)
    path = tmp_path / "order.csv"
    path.write_text(
        "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1\n"
        "1RECV_F0,1F0,1RECV_F1,1B0,1SEND_B0,1F1,1B1,1SEND_B1\n"
    )
    return ran(path, 2, 2)


# -- trace files


def saved_events(trace, folder):
    path = folder / "a folder" / "of mine" / "step.json"
    trace.save(path)
    assert [file.name for file in path.parent.iterdir()] == ["step.json"]
    by_phase = defaultdict(list)
    for event in json.loads(path.read_text())["traceEvents"]:
        by_phase[event["ph"]].append(event)
    return by_phase


def track(event):
    return event["pid"], event["tid"]


def test_each_task_is_an_event_on_the_track_of_its_rank_and_stream(trace, tmp_path):
    events = saved_events(trace, tmp_path)
    assert set(events) == set("MXsfC")
    names = {track(e): e["args"]["name"] for e in events["M"] if e["name"] == "thread_name"}
    ranks = {e["pid"]: e["args"]["name"] for e in events["M"] if e["name"] == "process_name"}
    assert len({tid for _, tid in names}) == len(names) == 2 * trace.plan.num_ranks
    for event, record in zip(events["X"], trace.tasks, strict=True):
        assert (event["name"], event["cat"]) == (record.action, record.kind)
        assert event["args"] == {"stage": record.stage, "microbatch": record.microbatch}
        assert ranks[event["pid"]] == f"rank {record.rank}"
        assert names[track(event)] == record.stream
        assert event["ts"] == pytest.approx(record.begin * 1e6, abs=1e-3)
        assert event["dur"] == pytest.approx((record.end - record.begin) * 1e6, abs=2e-3)


def test_tracks_are_sorted_by_rank_and_stream(trace, tmp_path):
    metadata = saved_events(trace, tmp_path)["M"]
    order = {
        what: {track(e): e["args"]["sort_index"] for e in metadata if e["name"] == what}
        for what in ("process_sort_index", "thread_sort_index")
    }
    assert {pid: at for (pid, _), at in order["process_sort_index"].items()} == {
        rank: rank for rank in range(trace.plan.num_ranks)
    }
    for event in metadata:
        if event["name"] == "thread_name":
            stream = ["forward", "backward"].index(event["args"]["name"])
            assert order["thread_sort_index"][track(event)] == stream


def test_events_of_a_track_follow_one_another(trace, tmp_path):
    tracks = defaultdict(list)
    for event in saved_events(trace, tmp_path)["X"]:
        assert event["dur"] >= 0
        tracks[track(event)].append((event["ts"], event["ts"] + event["dur"]))
    for spans in tracks.values():
        assert spans == sorted(spans)
        # Rounded to nanoseconds.
        assert all(end <= begin + 1e-6 for (_, end), (begin, _) in itertools.pairwise(spans))


def test_arrows_join_the_tasks_of_each_message(trace, tmp_path):
    events = saved_events(trace, tmp_path)
    plan = trace.plan
    number = {plan.action(task): task for task in range(len(plan))}

    def tasks_at(arrow):
        around = [
            e for e in events["X"] if track(e) == track(arrow) and e["ts"] <= arrow["ts"] <= e["ts"] + e["dur"]
        ]
        return [number[e["name"]] for e in around]

    finish = {arrow["id"]: arrow for arrow in events["f"]}
    assert len(finish) == len(events["f"]) == len(events["s"]) == plan.num_messages > 0
    met = Counter()
    for start in events["s"]:
        end = finish.pop(start["id"])
        assert (start["name"], start["cat"]) == (end["name"], end["cat"])
        assert start["ts"] <= end["ts"] and end["bp"] == "e" and start["pid"] != end["pid"]
        pairs = [
            (before, after)
            for after in tasks_at(end)
            for before in tasks_at(start)
            if before in plan.dependencies(after)
        ]
        assert len(pairs) == 1
        met[pairs[0]] += 1
        _, from_stage, *_ = plan.describe(pairs[0][0])
        _, to_stage, *_ = plan.describe(pairs[0][1])
        assert start["name"] == ("activation" if from_stage < to_stage else "gradient")
    assert set(met.values()) == {1}


def alive(counters):
    by_rank = defaultdict(list)
    for event in counters:
        assert event["name"] == "activations"
        by_rank[event["pid"]].append((event["ts"], event["args"]["alive"]))
    return by_rank


def test_activations_are_counted_from_forward_to_backward(trace, tmp_path):
    counters = alive(saved_events(trace, tmp_path)["C"])
    assert sorted(counters) == list(range(trace.plan.num_ranks))
    for rank, changes in counters.items():
        times, counts = zip(*changes)
        assert list(times) == sorted(set(times))
        assert min(counts) == 0 and counts[-1] == 0
        if trace.plan.overlap:
            assert 0 < max(counts) <= trace.peak_in_flight[rank]
        else:
            assert max(counts) == trace.peak_in_flight[rank]


def test_where_the_backward_is_split_activations_live_until_w():
    plan = pe.build_plan(SPLIT, num_stages=2, microbatches=2)
    simulated = pe.simulate(plan)
    tasks = records.task_records(plan, simulated.begin, simulated.end)
    events = perfetto.chrome_trace(plan, tasks)["traceEvents"]
    second = 1e6
    assert alive(e for e in events if e["ph"] == "C")[1] == [
        (1 * second, 1),  # F0
        (3 * second, 2),  # F1, after I0
        (6 * second, 1),  # W0
        (7 * second, 0),
    ]
    assert {e["cat"] for e in events if e["ph"] == "X"} == {"F", "I", "W"}


# -- pictures


@pytest.fixture
def figures(monkeypatch):
    """The matplotlib figures drawn so far."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    from pipeline_ext.report import picture

    drawn = []
    draw = picture.figure

    def spy(*args):
        drawn.append(draw(*args))
        return drawn[-1]

    monkeypatch.setattr(picture, "figure", spy)
    return drawn


@pytest.fixture
def drawing(figures, tmp_path):
    """Draws the simulated plan of a schedule and returns the figure."""

    def draw(schedule, costs=None, **shape):
        pe.build_plan(schedule, **shape).draw(tmp_path / "plan.svg", costs=costs)
        return figures[-1]

    return draw


def boxes(ax):
    """(left, right, top, bottom, colour) of each task."""
    (collection,) = ax.collections
    found = []
    for path, color in zip(collection.get_paths(), collection.get_facecolors(), strict=True):
        (left, top), (right, bottom) = path.vertices.min(axis=0), path.vertices.max(axis=0)
        found.append((left, right, top, bottom, tuple(color[:3])))
    return found


def numbers(ax):
    return [text.get_text() for text in ax.texts if text.get_text().isdigit()]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def headline(figure):
    return figure.texts[0].get_text()


def grey(color):
    red, green, blue = color
    return 0.299 * red + 0.587 * green + 0.114 * blue


def test_a_plan_is_drawn_with_its_bubble(drawing):
    figure = drawing("1f1b", num_stages=2, microbatches=8)
    (ax,) = figure.axes
    assert headline(figure) == "2 stages on 2 ranks, 8 microbatches"
    assert ax.get_title(loc="left") == "Plan, simulated: bubble 11.1 %"
    assert ax.get_xlabel() == "time (F = 1)"
    assert ax.get_xlim() == (0, 27)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["rank 0", "rank 1"]
    assert Counter(numbers(ax)) == {str(m): 4 for m in range(8)}
    # Below the boxes, each row is grey from the begin to the end.
    assert [(bar.get_x(), bar.get_width()) for bar in ax.patches] == [(0, 27), (0, 27)]


def test_every_task_is_a_box_where_it_runs(drawing):
    plan = pe.build_plan("gpipe", num_stages=3, microbatches=4)
    simulated = pe.simulate(plan)
    (ax,) = drawing("gpipe", num_stages=3, microbatches=4).axes
    expected = sorted(
        (begin, end, plan.describe(task)[3])
        for task, (begin, end) in enumerate(zip(simulated.begin, simulated.end))
    )
    assert expected == sorted(
        (left, right, round((top + bottom) / 2)) for left, right, top, bottom, _ in boxes(ax)
    )


def test_each_kind_has_its_colour_and_only_those_that_occur_are_named(drawing):
    shape = {"num_stages": 2, "microbatches": 2}
    whole = drawing("1f1b", **shape)
    split = drawing(SPLIT, **shape)
    assert legend(whole) == ["forward", "backward", "bubble"]
    assert legend(split) == ["forward", "input gradient", "weight gradient", "bubble"]
    assert sorted(Counter(box[-1] for box in boxes(whole.axes[0])).values()) == [4, 4]
    assert sorted(Counter(box[-1] for box in boxes(split.axes[0])).values()) == [4, 4, 4]
    greys = {grey(box[-1]) for figure in (whole, split) for box in boxes(figure.axes[0])}
    assert len(greys) == 4
    ordered = sorted(greys)
    assert min(b - a for a, b in itertools.pairwise(ordered)) > 0.1


def test_later_stages_of_a_rank_are_paler_and_forward_stays_darker_than_backward(drawing):
    figure = drawing("interleaved-1f1b", num_stages=8, num_ranks=2, microbatches=4)
    (ax,) = figure.axes
    of_kind = defaultdict(set)
    for left, right, _, _, color in boxes(ax):
        of_kind[round(right - left)].add(color)  # F takes 1, B takes 2
    assert [len(of_kind[time]) for time in (1, 2)] == [4, 4]
    assert max(map(grey, of_kind[1])) < min(map(grey, of_kind[2]))
    assert "paler: a rank's later stages" in [text.get_text() for text in figure.texts]


def test_numbers_are_left_out_where_they_do_not_fit(drawing):
    few = drawing("1f1b", num_stages=16, microbatches=8).axes[0]
    many = drawing("1f1b", num_stages=16, microbatches=64).axes[0]
    assert len(numbers(few)) == len(boxes(few)) == 2 * 16 * 8
    assert len(boxes(many)) == 2 * 16 * 64
    assert numbers(many) == []
    # F is too narrow, B is not.
    (ax,) = drawing("1f1b", num_stages=4, microbatches=16).axes
    assert Counter(numbers(ax)) == {str(m): 2 * 4 for m in range(16)}
    costs = pe.Costs(forward=0.2, backward=2)
    (ax,) = drawing("1f1b", costs, num_stages=4, microbatches=16).axes
    assert Counter(numbers(ax)) == {str(m): 4 for m in range(16)}
    assert ax.get_xlabel() == "time (unit of the costs)"


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("ranks, microbatches", [(2, 24), (4, 12), (16, 8)])
def test_numbers_lie_inside_their_boxes(drawing, ranks, microbatches, overlap):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = drawing("1f1b", num_stages=ranks, microbatches=microbatches, overlap=overlap)
    (ax,) = figure.axes
    figure.dpi = 600  # measures to a fraction of a point
    renderer = FigureCanvasAgg(figure).get_renderer()
    assert numbers(ax)
    for text in (text for text in ax.texts if text.get_text().isdigit()):
        x, y = text.get_position()
        box = next(b for b in boxes(ax) if b[0] < x < b[1] and b[2] < y < b[3])
        left, right, top, bottom, _ = box
        (x0, y0), (x1, y1) = ax.transData.transform([(left, bottom), (right, top)])
        extent = text.get_window_extent(renderer)
        assert x0 <= extent.x0 < extent.x1 <= x1
        assert 0 < extent.height <= y1 - y0


def test_streams_have_rows_of_their_own_only_where_they_may_run_together(drawing):
    def rows(ax):
        return {(round(top, 2), round(bottom, 2)) for _, _, top, bottom, _ in boxes(ax)}

    shape = {"num_stages": 2, "microbatches": 4}
    assert rows(drawing("1f1b", **shape).axes[0]) == {(-0.42, 0.42), (0.58, 1.42)}
    (ax,) = drawing("1f1b", **shape, overlap=True).axes
    halves = {(-0.42, 0), (0, 0.42), (0.58, 1), (1, 1.42)}
    assert rows(ax) == halves
    (ax,) = drawing("dualpipev", num_stages=4, microbatches=8).axes  # the parts of its pairs run together
    assert rows(ax) == halves | {(-0.42, 0.42), (0.58, 1.42)}


def test_a_step_is_drawn_below_its_plan_on_one_time_axis(trace, figures, tmp_path):
    trace.save(tmp_path / "step.png")
    (figure,) = figures
    planned, measured = figure.axes
    simulated = pe.simulate(trace.plan, trace.profile().costs(trace.plan))
    assert f"bubble {100 * simulated.bubble:.1f} %" in planned.get_title(loc="left")
    assert f"Measured step: bubble {100 * trace.bubble:.1f} %" == measured.get_title(loc="left")
    longest = max(simulated.makespan, trace.step_time)
    assert planned.get_xlim() == measured.get_xlim() == (0, pytest.approx(longest))
    assert [bar.get_width() for bar in planned.patches] == [simulated.makespan] * trace.plan.num_ranks
    assert [bar.get_width() for bar in measured.patches] == [trace.step_time] * trace.plan.num_ranks
    computing = [r for r in trace.tasks if r.kind in ("F", "B")]
    assert len(boxes(planned)) == len(boxes(measured)) == len(computing)
    assert measured.get_xlabel() == "time (ms)"
    assert measured.xaxis.get_major_formatter()(0.0125, 0) == "12.5"
    texts = [text.get_text() for text in measured.texts]
    for bubble in trace.bubble_by_rank:
        assert f"{100 * bubble:.1f} %" in texts


def test_pictures_grow_with_the_ranks(drawing):
    heights = [
        drawing("1f1b", num_stages=ranks, microbatches=8).get_size_inches()[1] for ranks in (1, 2, 4, 8, 16, 64)
    ]
    assert heights == sorted(set(heights))
    assert heights[1] < 2 and heights[4] < 5


def test_a_plan_that_takes_no_time_is_drawn(drawing):
    figure = drawing("1f1b", pe.Costs(forward=0, backward=0), num_stages=1, microbatches=1)
    assert headline(figure) == "1 stage on 1 rank, 1 microbatch"


@pytest.mark.parametrize("name, head", [("a.png", b"\x89PNG"), ("a.SVG", b"<?xml"), ("sub/a.pdf", b"%PDF")])
def test_a_picture_is_written_as_its_suffix_says(figures, tmp_path, name, head):
    plan = pe.build_plan("1f1b", num_stages=2, microbatches=2)
    plan.draw(tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(head)
    ran("1f1b", 2, 2).save(str(tmp_path / name))
    assert (tmp_path / name).read_bytes().startswith(head)
    assert len(figures) == 2


def test_drawing_leaves_matplotlib_as_the_user_set_it(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    script = f"""
import sys
import pipeline_ext as pe
plan = pe.build_plan("1f1b", num_stages=2, microbatches=2)
assert "matplotlib" not in sys.modules
import matplotlib
matplotlib.rcParams["font.size"] = 33
before = matplotlib.rcParams.copy()
plan.draw({str(tmp_path / "plan.png")!r})
assert "matplotlib.pyplot" not in sys.modules
assert all(matplotlib.rcParams[name] == before[name] for name in before if name != "backend")
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


# -- refusals


@pytest.mark.parametrize("path", ["step.txt", "step", "png", 3, None])
def test_other_files_are_refused(path):
    trace = ran("1f1b", 2, 2)
    with pytest.raises(pe.InvalidArgument) as refused:
        trace.save(path)
    assert str(refused.value) == (f"the path is {str(path)!r}; give one that ends in .json, .png, .svg or .pdf")
    with pytest.raises(pe.InvalidArgument, match=r"ends in \.png, \.svg or \.pdf"):
        trace.plan.draw(path)


def test_costs_that_do_not_fit_are_refused(tmp_path):
    plan = pe.build_plan("1f1b", num_stages=2, microbatches=2)
    with pytest.raises(pe.InvalidSchedule):
        plan.draw(tmp_path / "plan.png", costs=pe.Costs(forward=[1, 1, 1]))
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_error_says_how_to_get_it(monkeypatch, tmp_path):
    trace = ran("1f1b", 2, 2)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (trace.save, trace.plan.draw):
        with pytest.raises(pe.PipelineError, match=r'pip install "pipeline_ext\[plot\]"'):
            draw(tmp_path / "a.png")
    trace.save(tmp_path / "a.json")
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_file_that_cannot_be_written_leaves_what_was_there(monkeypatch, tmp_path):
    trace = ran("1f1b", 2, 2)
    path = tmp_path / "step.json"
    path.write_text("precious")
    with pytest.raises(pe.PipelineError, match="cannot be written"):
        trace.save(path / "below a file.json")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(pe.PipelineError, match=r"step\.json' cannot be written: disk full"):
            trace.save(path)
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]
