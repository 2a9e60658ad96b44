// Draws the maps of attention, and the row of a token on the text.
(() => {
  "use strict";
  const root = document.querySelector(".maps");
  if (!root) return;
  const { say, hush, make } = window.andromedaTip;
  const tokens = JSON.parse(root.dataset.tokens);
  const count = tokens.length;
  const at = (row, column) => (row * (row + 1)) / 2 + column;
  const bytes = (button) => (button.bytes ??= Uint8Array.from(atob(button.dataset.map), (c) => c.charCodeAt(0)));
  const shown = (byte) => {
    const weight = (byte / 255) ** 2;
    return weight < 0.0005 ? "0" : (100 * weight).toFixed(weight < 0.1 ? 1 : 0) + " %";
  };
  const paint = (canvas, data, side) => {
    const scale = window.devicePixelRatio || 1;
    canvas.width = canvas.height = Math.round(side * scale);
    canvas.style.maxWidth = side + "px";
    const style = getComputedStyle(document.documentElement);
    const pen = canvas.getContext("2d");
    const cell = canvas.width / count;
    pen.fillStyle = style.getPropertyValue("--grid");
    pen.fillRect(0, 0, canvas.width, canvas.height);
    pen.fillStyle = style.getPropertyValue("--plus");
    for (let row = 0; row < count; row++) {
      for (let column = 0; column <= row; column++) {
        pen.globalAlpha = data[at(row, column)] / 255;
        const x = Math.round(column * cell), y = Math.round(row * cell);
        pen.fillRect(x, y, Math.round((column + 1) * cell) - x, Math.round((row + 1) * cell) - y);
      }
    }
    pen.globalAlpha = 1;
  };
  const buttons = [...root.querySelectorAll("button.map")];
  const big = document.getElementById("map-big");
  const text = document.getElementById("map-text");
  let chosen = buttons[0];
  let row = Number(root.dataset.position);
  const spans = tokens.map((token, i) => {
    const span = make("span", token, "token plus");
    span.tabIndex = 0;
    const look = () => { row = i; shade(); };
    span.addEventListener("pointerenter", look);
    span.addEventListener("focus", look);
    text.append(span);
    if (token.includes("\u21B5")) text.append(document.createElement("br"));
    return span;
  });
  const shade = () => {
    const data = bytes(chosen);
    spans.forEach((span, i) => {
      const byte = i <= row ? data[at(row, i)] : 0;
      span.style.setProperty("--s", byte / 255);
      span.classList.toggle("strong", byte > 153);
      span.classList.toggle("here", i === row);
      span.dataset.tip = i <= row ? `${tokens[row]} looks at ${tokens[i]}: ${shown(byte)}` : `${tokens[i]} comes later`;
    });
    document.getElementById("map-says").textContent = `Where ${tokens[row]} (token ${row}) looks:`;
  };
  const choose = (button) => {
    chosen = button;
    buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
    document.getElementById("map-name").textContent = button.dataset.name;
    paint(big, bytes(button), 380);
    shade();
  };
  const cellOf = (event) => {
    const box = big.getBoundingClientRect();
    return [event.clientY - box.top, event.clientX - box.left].map((v) => Math.min(count - 1, Math.max(0, Math.floor((v / box.width) * count))));
  };
  big.addEventListener("pointermove", (event) => {
    const [y, x] = cellOf(event);
    const told = x <= y ? shown(bytes(chosen)[at(y, x)]) : "comes later";
    say([make("span", `${tokens[y]} looks at ${tokens[x]}: ${told}`, "row")], event.clientX, event.clientY);
    if (row !== y) { row = y; shade(); }
  });
  big.addEventListener("pointerleave", hush);
  const draw = () => {
    buttons.forEach((button) => paint(button.querySelector("canvas"), bytes(button), 72));
    choose(chosen);
  };
  buttons.forEach((button) => button.addEventListener("click", () => choose(button)));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
})();
