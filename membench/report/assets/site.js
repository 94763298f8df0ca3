"use strict";
// Tables that sort and filter, charts to hover over, light and dark. Nothing is loaded, and text only
// ever becomes text: no innerHTML anywhere.

const SVG = "http://www.w3.org/2000/svg";

function make(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function draw(name, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

// --- Light and dark ---------------------------------------------------------------------------

function themes(button) {
  const order = ["auto", "light", "dark"];
  const read = () => { try { return localStorage.getItem("membench-theme"); } catch { return null; } };
  const show = (theme) => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
    button.dataset.now = theme;
  };
  show(order.includes(read()) ? read() : "auto");
  button.hidden = false;
  button.addEventListener("click", () => {
    const next = order[(order.indexOf(button.dataset.now) + 1) % order.length];
    try { localStorage.setItem("membench-theme", next); } catch { /* private window */ }
    show(next);
  });
}

// --- Tables -----------------------------------------------------------------------------------

function valueOf(row, column) {
  const cell = row.cells[column];
  const text = cell.dataset.value ?? cell.textContent.trim();
  const number = Number(text);
  return text !== "" && Number.isFinite(number) ? number : text;
}

function compare(a, b) {
  if (a === "" || b === "") return (a === "") - (b === "");
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}

function sortable(table) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = make("button", { type: "button" }, ...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const first = head.classList.contains("text") || head.dataset.first === "up" ? "ascending" : "descending";
      const flipped = now === "ascending" ? "descending" : "ascending";
      const next = now === "none" ? first : flipped;
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", next);
      const sign = next === "ascending" ? 1 : -1;
      const rows = [...body.rows].map((row, place) => [valueOf(row, column), place, row]);
      rows.sort((a, b) => {
        const empty = (a[0] === "") - (b[0] === "");
        return empty || sign * compare(a[0], b[0]) || a[1] - b[1];
      });
      body.append(...rows.map((row) => row[2]));
    });
  });
}

function filterable(section) {
  const table = section.querySelector("table");
  const controls = [...section.querySelectorAll("[data-filter]")];
  const status = section.querySelector(".status");
  const apply = () => {
    let shown = 0;
    for (const row of table.tBodies[0].rows) {
      const keep = controls.every((control) => {
        const wanted = control.value;
        if (wanted === "") return true;
        if (control.dataset.filter === "*") {
          const text = row.textContent.toLowerCase();
          return wanted.toLowerCase().split(/\s+/).every((word) => text.includes(word));
        }
        return row.dataset[control.dataset.filter] === wanted;
      });
      row.hidden = !keep;
      shown += keep;
    }
    status.textContent = `${shown} of ${table.tBodies[0].rows.length} rows`;
  };
  for (const control of controls) control.addEventListener("input", apply);
  section.querySelector(".tools").hidden = false;
  apply();
}

// --- Charts -----------------------------------------------------------------------------------

function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((f) => f * size).find((s) => s >= raw);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

const show = (value, digits) => value === null || value === undefined ? "–" : Number(value.toFixed(digits)).toLocaleString("en", { maximumFractionDigits: digits });

function chart(figure) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const host = figure.querySelector(".plot");
  const names = [...new Set(data.series.map((s) => s.name))];
  const sides = [...new Set(data.series.map((s) => s.side))];
  const off = new Set();
  const colourOf = (name) => `s${(data.colours?.[name] ?? names.indexOf(name)) % 7}`;
  const H = 290, left = 40, right = 14, top = 12, bottom = 40;
  let W = 560;
  const all = data.series.flatMap((s) => s.x);
  const tall = data.series.flatMap((s) => [...s.y, ...(s.high ?? [])]).filter((v) => v !== null);
  const deep = data.series.flatMap((s) => [...s.y, ...(s.low ?? [])]).filter((v) => v !== null);
  const x0 = Math.min(...all), x1 = Math.max(...all) === x0 ? x0 + 1 : Math.max(...all);
  const y0 = Math.min(0, ...deep), y1 = data.top ?? (Math.max(...tall, y0 + 1e-9) * 1.05);
  const X = (v) => left + (data.reverse ? x1 - v : v - x0) / (x1 - x0) * (W - left - right);
  const Y = (v) => top + (y1 - v) / (y1 - y0) * (H - top - bottom);
  const stops = [...new Set(all)].sort((a, b) => a - b);
  let at = null;

  const svg = draw("svg", { tabindex: "0", role: "img", "aria-label": `${data.title}. Left and right arrow keys read the values.` });
  const tip = make("div", { class: "tip", role: "status" });
  tip.hidden = true;
  host.append(svg, tip);

  function lines() {
    W = Math.max(260, Math.round(host.clientWidth) || 560);
    svg.setAttribute("viewBox", `0 0 ${W} ${H}`);
    svg.replaceChildren();
    for (const v of ticks(y0, y1, 5)) {
      svg.append(draw("line", { class: "grid", x1: left, x2: W - right, y1: Y(v), y2: Y(v) }));
      svg.append(draw("text", { x: left - 8, y: Y(v) + 4, "text-anchor": "end" }, `${show(v, data.y_digits ?? 1)}%`));
    }
    for (const v of ticks(x0, x1, W < 420 ? 4 : 6)) svg.append(draw("text", { x: X(v), y: H - bottom + 18, "text-anchor": "middle" }, show(v, data.x_digits ?? 2)));
    svg.append(draw("text", { x: (left + W - right) / 2, y: H - 4, "text-anchor": "middle" }, data.x));
    for (const m of data.marks ?? []) {
      if (m.at < x0 || m.at > x1) continue;
      svg.append(draw("line", { class: "mark", x1: X(m.at), x2: X(m.at), y1: top, y2: H - bottom }));
      svg.append(draw("text", { x: X(m.at) + 3, y: top + 10 + 13 * (m.row ?? 0) }, m.name));
    }
    for (const s of data.series) {
      if (off.has(s.name)) continue;
      const colour = colourOf(s.name);
      const dashed = sides.indexOf(s.side) > 0;
      let path = "", pen = "M";
      s.x.forEach((x, i) => {
        if (s.y[i] === null) { pen = "M"; return; }
        path += `${pen}${X(x).toFixed(1)},${Y(s.y[i]).toFixed(1)}`;
        pen = "L";
        if (s.low?.[i] !== undefined && s.low[i] !== null) svg.append(draw("line", { class: `whisker ${colour}`, x1: X(x), x2: X(x), y1: Y(s.low[i]), y2: Y(s.high[i]) }));
        if (data.dots) svg.append(draw("circle", { class: `${colour}${dashed ? " hollow" : ""}`, cx: X(x), cy: Y(s.y[i]), r: 3.5 }));
      });
      svg.append(draw("path", { class: `line ${colour}${dashed ? " dash" : ""}`, d: path }));
    }
    if (at !== null) cursor();
  }

  function cursor() {
    const x = stops[at];
    svg.append(draw("line", { class: "cursor", x1: X(x), x2: X(x), y1: top, y2: H - bottom }));
    const table = make("table", {}, make("caption", {}, `${data.x}: ${show(x, data.x_digits ?? 2)}`));
    if (sides.length > 1) table.append(make("thead", {}, make("tr", {}, make("td"), ...sides.map((side) => make("th", {}, side)))));
    const body = make("tbody");
    for (const name of names) {
      if (off.has(name)) continue;
      const mine = data.series.filter((s) => s.name === name);
      const cells = sides.map((side) => {
        const s = mine.find((one) => one.side === side);
        const i = s ? s.x.indexOf(x) : -1;
        if (i < 0 || s.y[i] === null) return "";
        svg.append(draw("circle", { class: `${colourOf(name)}${sides.indexOf(side) > 0 ? " hollow" : ""}`, cx: X(x), cy: Y(s.y[i]), r: 4 }));
        const interval = s.low?.[i] === undefined || s.low[i] === null ? "" : ` [${show(s.low[i], data.y_digits ?? 1)}, ${show(s.high[i], data.y_digits ?? 1)}]`;
        return show(s.y[i], data.y_digits ?? 1) + interval;
      });
      if (cells.every((cell) => cell === "")) continue;
      const key = draw("svg", { class: "key", viewBox: "0 0 10 10" }, draw("circle", { class: colourOf(name), cx: 5, cy: 5, r: 4 }));
      body.append(make("tr", {}, make("th", {}, key, name), ...cells.map((cell) => make("td", {}, cell || "–"))));
    }
    table.append(body);
    tip.replaceChildren(table);
    tip.hidden = false;
    const box = svg.getBoundingClientRect(), place = X(x) / W * box.width;
    // beside the cursor where there is room, else below the plot, where it hides no line
    const room = tip.offsetWidth + 16;
    const beside = box.width - place > room ? place + 14 : place > room ? place - room + 2 : null;
    tip.style.left = `${beside ?? 0}px`;
    tip.style.top = `${beside === null ? box.height : 8}px`;
  }

  function move(next) {
    at = next === null ? null : Math.max(0, Math.min(stops.length - 1, next));
    tip.hidden = at === null;
    lines();
  }

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const px = (event.clientX - box.left) / box.width * W;
    let best = 0;
    stops.forEach((x, i) => { if (Math.abs(X(x) - px) < Math.abs(X(stops[best]) - px)) best = i; });
    if (best !== at) move(best);
  });
  svg.addEventListener("pointerleave", () => move(null));
  svg.addEventListener("blur", () => move(null));
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, PageUp: 10, PageDown: -10 }[event.key];
    if (step) move(at === null ? (step > 0 ? 0 : stops.length - 1) : at + (data.reverse ? -step : step));
    else if (event.key === "Home") move(0);
    else if (event.key === "End") move(stops.length - 1);
    else if (event.key === "Escape") move(null);
    else return;
    event.preventDefault();
  });

  if (names.length > 1) {
    const legend = make("div", { class: "legend", role: "group", "aria-label": "Lines shown" });
    names.forEach((name) => {
      const key = draw("svg", { viewBox: "0 0 18 10", "aria-hidden": "true" }, draw("line", { class: `line ${colourOf(name)}`, x1: 0, x2: 18, y1: 5, y2: 5 }));
      const button = make("button", { type: "button", "aria-pressed": "true" }, key, name);
      button.addEventListener("click", () => {
        if (off.has(name)) off.delete(name); else off.add(name);
        button.setAttribute("aria-pressed", String(!off.has(name)));
        lines();
      });
      legend.append(button);
    });
    host.append(legend);
  }
  if (sides.length > 1) host.append(make("p", { class: "quiet small" }, `Solid: ${sides[0]}. Dashed: ${sides.slice(1).join(", ")}.`));
  lines();
  if ("ResizeObserver" in window) {
    new ResizeObserver(() => { if (Math.abs(host.clientWidth - W) > 1 && host.clientWidth >= 260) lines(); }).observe(host);
  }
}

themes(document.querySelector(".theme"));
document.querySelectorAll("table.sortable").forEach(sortable);
document.querySelectorAll(".filterable").forEach(filterable);
document.querySelectorAll("figure.chart").forEach(chart);
document.documentElement.dataset.ready = "yes";
