"""``pipeline-ext plan``: figures, files and errors."""

import json
import re
from html.parser import HTMLParser

import pytest

import pipeline_ext as pe
from pipeline_ext.cli import main
from pipeline_ext.plan.records import task_records
from pipeline_ext.report.memory_curve import memory_curve

KEYS = [
    "schedule", "ranks", "chunks", "microbatches", "feasible", "makespan", "ideal", "bubble",
    "bubble_from_first_start", "bubble_by_rank", "peak_in_flight", "peak_memory", "messages", "order",
    "lower_bound",
]  # fmt: skip
SHAPE = "--ranks 4 --microbatches 8".split()
DEADLOCK = "0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n"


@pytest.fixture
def plan(capsys):
    """Runs the command; returns its exit status, output and errors."""

    def run(*args):
        try:
            status = main(["plan", *map(str, args)])
        except SystemExit as end:  # argparse's
            status = end.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def figures(plan):
    """What ``--json -`` prints."""

    def run(*args):
        status, out, err = plan(*args, "--json", "-")
        assert status == 0, err
        assert "makespan" in err  # the table
        return json.loads(out)

    return run


def test_the_figures_are_those_of_the_simulation(figures):
    times = "--tf 1 --ti 1.5 --tw 0.5 --latency 0.25".split()
    found = figures("--schedule", "zb-h1", *SHAPE, *times)
    built = pe.build_plan("zb-h1", num_stages=4, microbatches=8)
    costs = pe.Costs(backward=2.0, input_grad=1.5, weight_grad=0.5, latency=0.25)
    simulation = pe.simulate(built, costs)
    assert list(found) == KEYS
    assert (found["schedule"], found["ranks"], found["chunks"], found["microbatches"]) == ("zb-h1", 4, 1, 8)
    assert found["feasible"] is True
    assert found["makespan"] == simulation.makespan
    assert found["ideal"] == pytest.approx(8 * 3.0)
    assert found["bubble"] == pytest.approx(1 - 24 / simulation.makespan)
    assert found["bubble_from_first_start"] == simulation.bubble_from_first_start
    assert found["bubble_by_rank"] == simulation.bubble_by_rank
    assert found["peak_in_flight"] == simulation.peak_in_flight
    assert found["peak_memory"] == simulation.peak_memory
    assert found["messages"] == built.num_messages == 48
    assert found["order"] == {str(rank): actions for rank, actions in built.order().items()}
    assert 24 <= found["lower_bound"] <= found["makespan"]


def test_a_share_of_the_busiest_rank_is_ideal(figures):
    found = figures("--schedule", "1f1b", *SHAPE, "--tf", "1,2,1,1", "--overhead", "0.5")
    assert found["ideal"] == pytest.approx(8 * (2 + 2))  # what messages take is bubble
    assert found["bubble"] == pytest.approx(1 - 32 / found["makespan"])


def test_an_order_that_is_searched_for_keeps_the_memory_there_is(figures):
    found = figures("--schedule", "zb-auto", "--ranks", "2", "--microbatches", "4", "--memory-limit", "2")
    assert found["schedule"] == "zb-auto" and found["chunks"] == 2  # the better of one and two
    assert max(found["peak_memory"]) <= 2
    one = figures("--schedule", "zb-auto", "--ranks", "2", "--microbatches", "4", "--chunks", "1")
    assert one["chunks"] == 1 and one["makespan"] > found["makespan"]
    tried = ("--trials", "50", "--seed", "3")
    assert figures("--schedule", "zb-auto", *SHAPE, *tried) == figures("--schedule", "zb-auto", *SHAPE, *tried)
    assert figures("--schedule", "zb-auto", *SHAPE, "--budget", "200ms")["feasible"]
    v = figures("--schedule", "zb-auto", "--ranks", "2", "--microbatches", "4", "--chunks", "2")
    assert v["chunks"] == 2
    assert v["order"]["0"][-1][:2] in ("0W", "0B", "3W", "3B")  # stages 0 and 3 lie on rank 0


def test_schedules_are_compared_at_equal_work(figures):
    names = ["1f1b", "zbv", "interleaved-1f1b", "dualpipe"]
    found = figures("--schedule", ",".join(names[:2]), "--schedule", ",".join(names[2:]), *SHAPE)
    assert [one["schedule"] for one in found] == names
    assert [one["chunks"] for one in found] == [1, 2, 2, 1]
    assert {one["ideal"] for one in found} == {8 * 3.0}
    alone = figures("--schedule", "zbv", *SHAPE)
    assert alone["ideal"] == 8 * 2 * 3.0  # alone, costs are of the stages it has
    assert alone["bubble"] == pytest.approx(found[1]["bubble"])
    halves = figures("--schedule", "1f1b,zbv", *SHAPE, "--chunks", "2", "--tf", "1,2,3,4,5,6,7,8")
    assert [one["ideal"] for one in halves] == [8 * (7 + 8 + 4), 8 * (4 + 5 + 4)]


def test_an_order_goes_to_csv_and_back(plan, figures, tmp_path):
    file = tmp_path / "a folder" / "order.csv"
    there = figures("--schedule", "zbv", *SHAPE, "--csv", file, "--latency", "0.5")
    back = figures("--from-csv", file, "--latency", "0.5")
    assert back.pop("schedule") == str(file)
    there.pop("schedule")
    assert back == there
    assert file.read_text() == pe.build_plan("zbv", num_stages=8, microbatches=8).to_csv()


def test_costs_come_from_a_file_and_options_win(figures, tmp_path):
    file = tmp_path / "costs.json"
    costs = pe.Costs(forward=[1.0, 2.0, 1.0, 1.0], backward=3.0, latency=0.5, act_memory=4.0, mem_i=1.0)
    costs.save(file)
    built = pe.build_plan("zb-h1", num_stages=4, microbatches=8)
    found = figures("--schedule", "zb-h1", *SHAPE, "--costs", file)
    assert found["makespan"] == pe.simulate(built, costs).makespan
    assert found["peak_memory"] == pe.simulate(built, costs).peak_memory
    found = figures("--schedule", "zb-h1", *SHAPE, "--costs", file, "--latency", "0", "--tw", "2.5")
    costs = pe.Costs(forward=[1.0, 2.0, 1.0, 1.0], backward=4.0, input_grad=1.5, act_memory=4.0, mem_i=1.0)
    assert found["makespan"] == pe.simulate(built, costs).makespan


def test_unequal_microbatches_come_from_an_option_or_a_file(plan, figures, tmp_path):
    file, page = tmp_path / "costs.json", tmp_path / "page.html"
    table = [[1.0 + (m == s) for m in range(8)] for s in range(4)]
    pe.Costs(input_grad=1.0, weight_grad=1.0, microbatch=table).save(file)
    built = pe.build_plan("zb-h1", num_stages=4, microbatches=8)
    found = figures("--schedule", "zb-h1", *SHAPE, "--costs", file, "--html", page)
    simulation = pe.simulate(built, pe.Costs(microbatch=table))
    assert found["makespan"] == simulation.makespan and found["ideal"] == 3 * 9
    assert simulation.makespan >= found["lower_bound"] >= 3 * 9
    (shown,) = read_page(page)["schedules"]
    assert [task[5:] for task in shown["tasks"]] == [
        [t.begin, t.end] for t in task_records(built, simulation.begin, simulation.end)
    ]
    factors = [1, 1, 6, 1, 1, 2, 1, 1]
    found = figures("--schedule", "zb-h1", *SHAPE, "--costs", file, "--microbatch-factors", "1,1,6,1,1,2,1,1")
    assert found["makespan"] == pe.simulate(built, pe.Costs(microbatch=factors)).makespan
    # A file of other stages is refused by its name; a schedule of two stages a rank does the same work.
    status, _, err = plan("--schedule", "1f1b", "--ranks", "3", "--microbatches", "8", "--costs", file)
    assert status == 2 and re.search(r"'microbatch' in '.*costs.json' has lists for 4 stages; give", err)
    both = figures("--schedule", "1f1b,zbv,zb-auto,auto", *SHAPE, "--costs", file, "--trials", "20")
    assert [one["ideal"] for one in both if one["chunks"] == 1] == [27.0] * sum(o["chunks"] == 1 for o in both)
    assert all(one["lower_bound"] <= one["makespan"] for one in both)


def read_page(file):
    page = Page()
    page.feed(file.read_text())
    return json.loads(page.data)


def test_a_search_chooses_among_microbatches_at_equal_work(figures):
    one = figures("--ranks", "4", "--microbatches", "4", "--trials", "20")
    found = figures("--ranks", "4", "--microbatches", "4,8", "--trials", "20", "--chunks", "1")
    assert found["microbatches"] == 8  # smaller parts leave a smaller bubble
    assert found["chunks"] == 1
    assert found["ideal"] == pytest.approx(4 * 3.0) == pytest.approx(one["ideal"])
    assert found["lower_bound"] <= found["makespan"]


def test_the_same_trials_and_seed_find_the_same(figures):
    args = ("--schedule", "auto", *SHAPE, "--trials", "30", "--seed", "3")
    assert figures(*args) == figures(*args)


def test_a_search_is_no_worse_than_the_schedules_it_knows(figures):
    *known, searched = figures("--schedule", "auto,1f1b,zb-h1", *SHAPE, "--trials", "50", "--chunks", "1")
    assert searched["makespan"] <= min(one["makespan"] for one in known)


def test_what_cannot_be_has_a_reason_beside_what_can(plan):
    status, out, err = plan("--schedule", "gpipe,1f1b", *SHAPE, "--memory-limit", "6", "--json", "-")
    assert status == 0
    gpipe, other = json.loads(out)
    assert (gpipe["feasible"], other["feasible"]) == (False, True)
    assert list(gpipe) == [*KEYS, "reason"] and list(other) == KEYS
    assert {gpipe[key] for key in KEYS[5:]} == {None}
    assert "gpipe is not possible" in err


def test_alone_what_cannot_be_ends_with_status_1(plan, tmp_path):
    page = tmp_path / "page.html"
    status, out, _ = plan("--schedule", "gpipe", *SHAPE, "--memory-limit", "6", "--html", page)
    assert status == 1
    assert "gpipe is not possible: " in out
    assert not list(tmp_path.iterdir())


def test_a_step_too_long_for_a_number_cannot_be(plan):
    status, out, _ = plan("--schedule", "1f1b", *SHAPE, "--tf", "1e308")
    assert status == 1
    assert "1f1b is not possible: the step takes longer than a number can tell" in out


def test_a_deadlock_is_named_with_its_cycle(plan, tmp_path):
    file = tmp_path / "order.csv"
    file.write_text(DEADLOCK)
    status, out, _ = plan("--from-csv", file)
    assert status == 1
    assert "order.csv is not possible" in out and "0B0 waits for 1B0 on rank 1" in out


@pytest.mark.parametrize(
    "args, said",
    [
        (["--schedule", "2f2b", *SHAPE], "there is no schedule '2f2b'"),
        (["--schedule", "1f1b", "--ranks", "4"], "--microbatches is missing, which 1f1b needs"),
        (["--microbatches", "4"], "--ranks is missing, which auto needs"),
        (["--schedule", "1f1b", *SHAPE, "--tf", "-1"], "'-1' is not a number of at least 0, or several"),
        (["--schedule", "1f1b", *SHAPE, "--bandwidth", "0"], "'0' is not a number above 0"),
        (
            ["--schedule", "1f1b", *SHAPE, "--tf", "1,2"],
            "--tf has 2 entries; give one number, or one for each stage: 4 with 4 stages on 4 ranks",
        ),
        (
            ["--schedule", "1f1b", *SHAPE, "--microbatch-factors", "1,2"],
            "--microbatch-factors has factors for 2 microbatches; give one for each of the 8 microbatches",
        ),
        (["--schedule", "1f1b", *SHAPE, "--microbatch-factors", "1,nan"], "'1,nan' is not a number of"),
        (["--schedule", "1f1b", *SHAPE, "--latency", "1,2"], "--latency has 2 entries; .* each boundary: 3"),
        (["--schedule", "1f1b", *SHAPE, "--mem-i", "2"], "free more than the act_memory 1 that F takes"),
        (["--schedule", "1f1b,zbv", *SHAPE, "--latency", "1,2,3"], "latency is given for each boundary"),
        (["--schedule", "1f1b,gpipe", *SHAPE, "--csv", "x.csv"], "--csv holds one schedule, and several"),
        (["--schedule", "1f1b", *SHAPE, "--png", "x.txt"], "the path is 'x.txt'; give one that ends in .png"),
        (["--schedule", "1f1b", *SHAPE, "--budget", "5s"], "--budget and --trials bound a search"),
        ([*SHAPE, "--overlap"], "--overlap is for named schedules, and auto searches for ranks that run one"),
        (["--schedule", "1f1b", "--ranks", "4", "--microbatches", "4,8"], "several --microbatches are for a"),
        ([*SHAPE, "--budget", "soon"], "'soon' is not a time; write it as in 500ms, 5s or 1m"),
        (
            ["--schedule", "1f1b", "--ranks", "1000000000", "--microbatches", "1000000000"],
            "1000000000 microbatches at 1000000000 stages are more tasks than",
        ),
        (["--from-csv", "nowhere.csv"], "the schedule 'nowhere.csv' cannot be read: No such file"),
        (["--schedule", "1f1b", *SHAPE, "--costs", "nowhere.json"], "the costs 'nowhere.json' cannot be read"),
    ],
)
def test_options_that_cannot_be_used_end_in_one_sentence(plan, tmp_path, monkeypatch, args, said):
    monkeypatch.chdir(tmp_path)
    status, out, err = plan(*args)
    assert status == 2
    assert out == ""

    assert re.search(said, err) and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_schedules_of_a_csv_file_and_by_name_are_of_as_many_ranks(plan, tmp_path):
    (tmp_path / "order.csv").write_text(DEADLOCK.replace("1F1,1B1,1F0,1B0", "1F0,1B0,1F1,1B1"))
    status, _, err = plan("--from-csv", tmp_path / "order.csv", "--schedule", "1f1b", *SHAPE)
    assert status == 2
    assert "the schedules have 2 and 4 ranks" in err


class Page(HTMLParser):
    """Collects what a page would load, and the data in it."""

    def __init__(self):
        super().__init__()
        self.loads, self.data, self.open = [], "", []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.loads += [given[name] for name in ("src", "href") if name in given]
        self.open.append(given.get("id"))

    def handle_endtag(self, tag):
        self.open.pop()

    def handle_data(self, text):
        if self.open and self.open[-1] == "data":
            self.data += text


def test_the_page_stands_alone_and_holds_every_task(plan, tmp_path):
    file = tmp_path / "page.html"
    assert plan("--schedule", "1f1b,zb-h1,gpipe", *SHAPE, "--memory-limit", "6", "--html", file)[0] == 0
    text = file.read_text()
    page = Page()
    page.feed(text)
    assert page.loads == [] and "http" not in text and "@import" not in text and "url(" not in text
    data = json.loads(page.data)
    first, second, refused = data["schedules"]
    assert set(data["names"]) == {"F", "B", "I", "W"}
    assert "tasks" not in refused and "memory" in refused["figures"]
    for shown, name in ((first, "1f1b"), (second, "zb-h1")):
        built = pe.build_plan(name, num_stages=4, microbatches=8)
        costs = pe.Costs(input_grad=1.0, weight_grad=1.0)
        simulation = pe.simulate(built, costs)
        expected = [
            [t.kind, t.stage, t.microbatch, t.rank, 0, t.begin, t.end]
            for t in task_records(built, simulation.begin, simulation.end)
        ]
        assert shown["tasks"] == expected
        assert [max(amount for _, amount in curve) for curve in shown["memory"]] == simulation.peak_memory


def test_the_parts_of_a_pair_lie_above_one_another(plan, tmp_path):
    file = tmp_path / "page.html"
    assert plan("--schedule", "dualpipev", *SHAPE, "--html", file)[0] == 0
    page = Page()
    page.feed(file.read_text())
    (shown,) = json.loads(page.data)["schedules"]
    lanes = {(kind, stage, microbatch): lane for kind, stage, microbatch, _, lane, _, _ in shown["tasks"]}
    built = pe.build_plan("dualpipev", num_stages=8, microbatches=8)
    pairs = [cell for cells in built.order().values() for cell in cells if cell.startswith("(")]
    parts = [part for pair in pairs for part in re.findall(r"(\d+)([FB])(\d+)", pair)]
    paired = {(kind, int(stage), int(microbatch)): "-FB".index(kind) for stage, kind, microbatch in parts}
    assert paired and lanes == dict.fromkeys(lanes, 0) | paired


def test_the_title_of_a_page_ends_no_script(plan, tmp_path):
    file = tmp_path / "<!--<script>.csv"
    file.write_text(DEADLOCK.replace("1F1,1B1,1F0,1B0", "1F0,1B0,1F1,1B1"))
    assert plan("--from-csv", file, "--html", tmp_path / "page.html")[0] == 0
    page = Page()
    page.feed((tmp_path / "page.html").read_text())
    assert json.loads(page.data)["schedules"][0]["title"] == str(file)


def test_memory_is_freed_by_parts_and_in_the_end_all():
    plan = pe.build_plan("zb-h1", num_stages=2, microbatches=3)
    costs = pe.Costs(act_memory=[4.0, 2.0], mem_i=[1.0, 0.5])
    simulation = pe.simulate(plan, costs)
    curves = memory_curve(task_records(plan, simulation.begin, simulation.end), costs, 2)
    assert [max(amount for _, amount in curves[rank]) for rank in (0, 1)] == simulation.peak_memory
    assert [curves[rank][-1][1] for rank in (0, 1)] == [0.0, 0.0]


def test_pictures_show_all_schedules_on_one_time_axis(plan, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    from pipeline_ext.report import picture

    drawn = []
    draw = picture.figure
    monkeypatch.setattr(picture, "figure", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    file = tmp_path / "a folder" / "plans.png"
    assert plan("--schedule", "1f1b,zbv", *SHAPE, "--png", file)[0] == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    upper, lower = drawn[0].axes
    assert upper.get_xlim() == lower.get_xlim() == (0, 33)
    assert upper.get_title(loc="left") == "1f1b: bubble 27.3 %, peak memory 4"
    assert lower.get_title(loc="left").startswith("zbv: bubble ")
    assert drawn[0].texts[0].get_text() == "4 ranks, 8 microbatches"


def test_the_table_compares_schedules_and_shows_the_ranks_of_one(plan):
    status, out, err = plan("--schedule", "1f1b,zb-h1", *SHAPE)
    assert (status, err) == (0, "")
    assert "1f1b" in out and "27.3 %" in out and "zb-h1" in out and "rank" not in out
    _, out, _ = plan("--schedule", "1f1b", *SHAPE)
    assert "rank" in out
