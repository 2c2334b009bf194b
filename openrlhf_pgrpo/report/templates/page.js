"use strict";
// Draws a figure when it comes near the screen, in the colours of the page. Draws it again when these change.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const plots = [...document.querySelectorAll(".plot")];

  function theme() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const axis = {
      gridcolor: colour("--grid"), zerolinecolor: colour("--soft"), zeroline: false, linecolor: colour("--rule"),
      exponentformat: "power", ticklabelstandoff: 4,
      tickfont: { size: 11.5, color: colour("--soft") }, title: { font: { size: 12, color: colour("--soft") }, standoff: 8 },
    };
    return {
      layout: {
        font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: colour("--ink") },
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", xaxis: axis, yaxis: axis,
        legend: { tracegroupgap: 2 },
        hoverlabel: { bgcolor: colour("--raised"), bordercolor: colour("--rule"), font: { color: colour("--ink") } },
      },
    };
  }

  function draw(plot) {
    const { data, layout } = JSON.parse(document.getElementById(plot.dataset.figure).textContent);
    layout.template = theme();
    if (plot.clientWidth < 560 && layout.showlegend) {
      const rows = Math.ceil(data.filter((trace) => trace.name && trace.showlegend !== false).length / 2);
      layout.legend = { orientation: "h", y: -0.2, yanchor: "top" };
      layout.height += 22 * rows;
      plot.style.height = `${layout.height}px`;
    }
    const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
    Plotly.newPlot(plot, data, layout, config);
  }

  const drawn = (plot) => plot.classList.contains("js-plotly-plot");
  const watcher = new IntersectionObserver(
    (entries) => entries.forEach(({ isIntersecting, target }) => {
      if (!isIntersecting) return;
      watcher.unobserve(target);
      draw(target);
    }),
    { rootMargin: "800px" },
  );
  plots.forEach((plot) => watcher.observe(plot));
  dark.addEventListener("change", () => plots.filter(drawn).forEach((plot) => Plotly.relayout(plot, { template: theme() })));
  addEventListener("beforeprint", () => plots.filter((plot) => !drawn(plot) && plot.clientWidth).forEach(draw));
})();
