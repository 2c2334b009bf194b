"""A page in a real headless Chromium, opened as a file."""

import pytest

from openrlhf_pgrpo.report import write_report

pytestmark = pytest.mark.core
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)><b>\u2028\U0001f600 </extra> %{x} $x$"
LINK = "<a href='//x.y'>z</a>"


@pytest.fixture
def page_of(make_row, write_run, tmp_path):
    """The file of a report on runs of 30 steps, one for each list of preference groups."""

    def page_of(*runs):
        files = []
        for number, names in enumerate(runs):
            rows = []
            for step in range(1, 31):
                rewards = {name: (4, place + 0.01 * step * (place + 1), 0.5) for place, name in enumerate(names)}
                samples = [
                    {"pref_group": name, "prompt": name * 3, "response": f"{name}\nsecond line", "reward": 1.0}
                    for name in names
                ]
                record = {"started": 0, "settings": {"a.long.setting": "x" * 300, names[0]: number}}
                more = {names[0]: 1.0, "weight": 1.0}
                rows.append(make_row(step, rewards, samples, record if step == 1 else None, more))
            files.append(write_run(f"run-{number}-{names[0].replace('/', '')[:20]}", rows))
        return write_report(files, tmp_path / "report.html")

    return page_of


def draw_everything(page):
    """Opens every fold and scrolls past every figure: a figure is drawn when it comes near the screen."""
    page.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true })")
    for plot in page.locator(".plot").all():
        plot.scroll_into_view_if_needed()
    page.wait_for_function("document.querySelectorAll('.plot:not(.js-plotly-plot)').length === 0")


@pytest.mark.parametrize("runs", [[["ann", "bob"]], [["ann", "bob"], ["bob", "cleo"]]], ids=["one run", "two runs"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_opens_without_a_network_and_draws_every_figure(visit, page_of, runs, dark):
    file = page_of(*runs)
    with visit(file, dark=dark) as seen:
        draw_everything(seen.page)
        empty = "(plots) => plots.filter((p) => !p.querySelector('.trace, .bars')).map((p) => p.dataset.figure)"
        assert seen.page.locator(".plot").count() >= 12
        assert seen.page.locator(".plot").evaluate_all(empty) == []
        assert seen.requests == [file.as_uri()]
        assert seen.complaints == []


def test_the_page_itself_forbids_requests(visit, page_of):
    with visit(page_of(["ann", "bob"])) as seen:
        seen.page.evaluate("fetch('https://example.invalid/').catch(() => 0)")
        seen.page.wait_for_timeout(100)
        assert any("Content Security Policy" in complaint for complaint in seen.complaints)


def test_a_click_on_a_name_in_the_legend_hides_its_line(visit, page_of):
    with visit(page_of(["ann", "bob", "cleo"])) as seen:
        plot = seen.page.locator("#reward-per-preference-group .plot")
        plot.scroll_into_view_if_needed()
        lines = plot.locator(".scatterlayer .trace")
        lines.nth(2).wait_for(state="attached")
        assert lines.count() == 3
        plot.locator(".legendtoggle").nth(1).click()
        two = "(plot) => plot.querySelectorAll('.scatterlayer .trace').length === 2"
        seen.page.wait_for_function(two, arg=plot.element_handle())
        assert plot.evaluate("(plot) => plot.data.map((trace) => trace.visible ?? true)") == [True, "legendonly", True]


def test_hovering_shows_step_and_name(visit, page_of):
    with visit(page_of(["ann"])) as seen:
        plot = seen.page.locator("#rewards-each-on-its-own-scale .plot")
        plot.scroll_into_view_if_needed()
        plot.locator(".scatterlayer .trace").first.wait_for(state="attached")
        plot.locator(".nsewdrag").hover()
        assert "step" in plot.locator(".hoverlayer .hovertext").first.text_content()


def test_hostile_names_are_only_names(visit, page_of):
    with visit(page_of([EVIL, LINK], [EVIL, "w" * 3000])) as seen:
        draw_everything(seen.page)
        seen.page.wait_for_timeout(200)
        assert seen.dialogs == [] and seen.complaints == [] and len(seen.requests) == 1
        assert seen.page.locator("img").count() == 0
        assert seen.page.locator("script:not([type])").count() == 2
        shown = seen.page.locator("#at-a-glance tbody th bdi").first.text_content()
        assert shown == EVIL
        names = "(plots) => plots.flatMap((p) => [...p.querySelectorAll('.legendtext')].map((t) => t.textContent))"
        legend = seen.page.locator(".plot").evaluate_all(names)
        assert LINK in legend and seen.page.locator(".plot svg a").count() == 0
        assert any(name.startswith("</script><script>…") and name.endswith("%{x} $x$") for name in legend)


@pytest.mark.parametrize("runs", [[["ann", "b" * 400]], [["ann", EVIL], ["bob " * 50, "c"]]], ids=["one", "two"])
def test_nothing_is_wider_than_a_telephone(visit, page_of, runs):
    with visit(page_of(*runs), width=380) as seen:
        draw_everything(seen.page)
        assert seen.page.evaluate("document.documentElement.scrollWidth") == 380
        assert seen.complaints == []


def test_a_change_of_the_colour_scheme_reaches_the_figures(visit, page_of):
    with visit(page_of(["ann", "bob"])) as seen:
        plot = seen.page.locator("#reward-per-preference-group .plot")
        plot.scroll_into_view_if_needed()
        plot.locator(".legendtext").first.wait_for()
        ink = "(plot) => getComputedStyle(plot.querySelector('.legendtext')).fill"
        light = plot.evaluate(ink)
        seen.page.emulate_media(color_scheme="dark")
        seen.page.wait_for_function(f"([plot, light]) => ({ink})(plot) !== light", arg=[plot.element_handle(), light])


def test_a_printed_page_has_its_figures(visit, page_of):
    with visit(page_of(["ann", "bob"])) as seen:
        seen.page.evaluate("dispatchEvent(new Event('beforeprint'))")
        waiting = seen.page.locator("main > section > div .plot:not(.js-plotly-plot)")
        assert waiting.count() == 0


def test_an_answer_keeps_its_lines(visit, page_of):
    with visit(page_of(["ann", "bob"])) as seen:
        answer = seen.page.locator("#before-and-after .text").first
        assert answer.inner_text() in ("ann\nsecond line", "bob\nsecond line")
        assert answer.evaluate("(text) => getComputedStyle(text).whiteSpace") == "pre-wrap"
