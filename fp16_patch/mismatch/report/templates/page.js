"use strict";
// Draws every figure of the page, and keeps one state for all: which runs are hidden. A trace belongs to the run that
// its `legendgroup` names, a card of one run to its `data-run`.
(() => {
  const plots = [...document.querySelectorAll(".plot")];
  const buttons = [...document.querySelectorAll("button.run")];
  const cards = [...document.querySelectorAll("figure[data-run]")];
  const hidden = new Set();
  const dark = matchMedia("(prefers-color-scheme:dark)");
  const config = {
    displaylogo: false,
    responsive: true,
    displayModeBar: "hover",
    modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
  };

  const theme = () => {
    const style = getComputedStyle(document.documentElement);
    const [ink, soft, rule, card] = ["ink", "soft", "rule", "card"].map((name) => style.getPropertyValue(`--${name}`).trim());
    const axis = {
      gridcolor: rule,
      linecolor: rule,
      zerolinecolor: rule,
      tickcolor: rule,
      ticks: "outside",
      ticklen: 4,
      automargin: true,
      tickfont: { size: 11 },
      title: { standoff: 8, font: { size: 12 } },
    };
    return {
      layout: {
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)",
        font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: soft },
        margin: { l: 8, r: 10, t: 10, b: 8 },
        xaxis: { ...axis, showgrid: false, showline: true },
        yaxis: axis,
        hoverlabel: { bgcolor: card, bordercolor: rule, font: { color: ink, size: 12 }, namelength: 48 },
        legend: { orientation: "h", x: 0, y: 1.02, xanchor: "left", yanchor: "bottom", font: { color: ink } },
        modebar: { bgcolor: "rgba(0,0,0,0)", color: soft, activecolor: ink },
      },
    };
  };

  const visibility = (traces) => traces.map((trace) => (hidden.has(trace.legendgroup) ? "legendonly" : true));

  const showRuns = () => {
    for (const button of buttons) button.setAttribute("aria-pressed", String(!hidden.has(button.dataset.run)));
    for (const card of cards) card.hidden = hidden.has(card.dataset.run);
    for (const plot of plots) {
      if (!plot.closest("figure").hidden) Plotly.restyle(plot, { visible: visibility(plot.data) });
    }
  };

  const toggle = (name) => {
    if (!hidden.delete(name)) hidden.add(name);
    showRuns();
  };

  const runsIn = (plot) => [...new Set(plot.data.map((trace) => trace.legendgroup).filter(Boolean))];

  // Hides what shares a chart with the run. A second time on the same run shows all of it again.
  const showAlone = (name) => {
    const shared = plots.map(runsIn).filter((runs) => runs.includes(name)).flat();
    const others = [...new Set(shared)].filter((other) => other !== name);
    const isAlone = !hidden.has(name) && others.every((other) => hidden.has(other));
    hidden.delete(name);
    others.forEach((other) => (isAlone ? hidden.delete(other) : hidden.add(other)));
    showRuns();
  };

  // A click waits for the second one that would make it a double click.
  const onClicks = (button, name) => {
    let waiting = null;
    button.addEventListener("click", (event) => {
      clearTimeout(waiting);
      if (event.detail > 1) showAlone(name);
      else waiting = setTimeout(() => toggle(name), event.detail ? 220 : 0);
    });
  };

  const switchScale = (button) => {
    const figure = button.closest("figure");
    for (const each of figure.querySelectorAll("[data-scale]")) each.setAttribute("aria-pressed", String(each === button));
    Plotly.relayout(figure.querySelector(".plot"), { "yaxis.type": button.dataset.scale, "yaxis.autorange": true });
  };

  const draw = (plot) => {
    const { data, layout } = JSON.parse(plot.nextElementSibling.textContent);
    Plotly.newPlot(plot, data, { ...layout, template: theme() }, config);
    plot.on("plotly_legendclick", (event) => (toggle(event.data[event.curveNumber].legendgroup), false));
    plot.on("plotly_legenddoubleclick", (event) => (showAlone(event.data[event.curveNumber].legendgroup), false));
  };

  plots.forEach(draw);
  buttons.forEach((button) => onClicks(button, button.dataset.run));
  document.querySelectorAll("[data-scale]").forEach((button) => button.addEventListener("click", () => switchScale(button)));
  dark.addEventListener("change", () => plots.forEach((plot) => Plotly.relayout(plot, { template: theme() })));
})();
