// Tells the figures under the pointer; arrow keys move along a chart that has the focus.
(() => {
  "use strict";
  const tip = document.getElementById("tip");
  const say = (parts, x, y) => {
    tip.replaceChildren(...parts);
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - box.width - 4)) + "px";
    tip.style.top = (y + 18 + box.height > innerHeight ? y - box.height - 10 : y + 18) + "px";
  };
  const hush = () => { tip.hidden = true; };
  const make = (name, text, kind) => {
    const made = document.createElement(name);
    made.textContent = text;
    if (kind) made.className = kind;
    return made;
  };
  window.andromedaTip = { say, hush, make };

  const place = (scale, value) => {
    const [low, high, begin, end, log] = scale;
    const f = log ? Math.log : (v) => v;
    return begin + ((f(value) - f(low)) / (f(high) - f(low))) * (end - begin);
  };
  const nearest = (points, x, scale) => {
    let best = 0;
    points.forEach((point, i) => {
      if (Math.abs(place(scale, point[0]) - x) < Math.abs(place(scale, points[best][0]) - x)) best = i;
    });
    return best;
  };
  const show = (svg, x) => {
    const chart = svg.chart ??= JSON.parse(svg.dataset.chart);
    const full = chart.series.filter((s) => s.points.length);
    if (!full.length) return;
    const longest = full.reduce((a, b) => (b.points.length > a.points.length ? b : a));
    const index = nearest(longest.points, x, chart.x);
    const at = place(chart.x, longest.points[index][0]);
    svg.index = index;
    const cursor = svg.querySelector(".cursor");
    const ns = "http://www.w3.org/2000/svg";
    const line = document.createElementNS(ns, "path");
    line.setAttribute("d", `M${at},${chart.y[3]}V${chart.y[2]}`);
    const parts = [make("b", `${chart.label} ${longest.shown[index][0]}`)];
    const marks = [line];
    for (const series of full) {
      const i = nearest(series.points, at, chart.x);
      const where = place(chart.x, series.points[i][0]);
      if (Math.abs(where - at) > 24) continue;
      const dot = document.createElementNS(ns, "circle");
      dot.setAttribute("cx", where);
      dot.setAttribute("cy", place(chart.y, series.points[i][1]));
      dot.setAttribute("r", 3.5);
      dot.setAttribute("class", `dot c${series.color}`);
      marks.push(dot);
      const row = make("span", "", "row");
      row.append(make("i", "", `key c${series.color}`), `${series.name} `, make("em", series.shown[i][1]));
      parts.push(row);
    }
    cursor.replaceChildren(...marks);
    const box = svg.getBoundingClientRect();
    say(parts, box.left + (at / svg.viewBox.baseVal.width) * box.width, box.top + box.height / 3);
  };
  const leave = (svg) => { svg.querySelector(".cursor").replaceChildren(); hush(); };
  for (const svg of document.querySelectorAll("svg[data-chart]")) {
    const move = (event) => {
      const box = svg.getBoundingClientRect();
      show(svg, ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width);
    };
    svg.addEventListener("pointermove", move);
    svg.addEventListener("pointerdown", move);
    svg.addEventListener("pointerleave", () => leave(svg));
    svg.addEventListener("blur", () => leave(svg));
    svg.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!by) return;
      event.preventDefault();
      const chart = svg.chart ??= JSON.parse(svg.dataset.chart);
      const full = chart.series.filter((s) => s.points.length);
      if (!full.length) return;
      const longest = full.reduce((a, b) => (b.points.length > a.points.length ? b : a)).points;
      const next = Math.max(0, Math.min(longest.length - 1, (svg.index ?? -1) + by));
      show(svg, place(chart.x, longest[next][0]));
    });
  }
  document.addEventListener("pointermove", (event) => {
    if (!(event.target instanceof Element) || event.target.closest("svg[data-chart], canvas")) return;
    const told = event.target.closest("[data-tip]");
    if (told) say(told.dataset.tip.split("\n").map((line) => make("span", line, "row")), event.clientX, event.clientY);
    else hush();
  });
  document.addEventListener("scroll", hush, { passive: true });
})();
