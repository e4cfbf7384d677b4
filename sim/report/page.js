"use strict";
(() => {
  document.documentElement.classList.add("js"); // without a script no control is shown
  // Tables: sort by a column's button; filter by words and by KEY=VALUE, KEY<VALUE, KEY>VALUE.
  for (const grid of document.querySelectorAll(".grid")) {
    const heads = [...grid.querySelectorAll("th[data-key]")];
    const body = grid.querySelector("tbody");
    const rows = [...body.rows];
    const keys = heads.map((h) => h.dataset.key);
    const of = (row, column) => {
      const cell = row.cells[column];
      return cell.dataset.v === undefined ? cell.textContent : cell.dataset.v === "" ? null : Number(cell.dataset.v);
    };
    const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a) < String(b) ? -1 : a === b ? 0 : 1);
    heads.forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const text = rows.length > 0 && typeof of(rows[0], column) === "string";
        const now = head.getAttribute("aria-sort");
        const next = now === "none" ? (text ? "ascending" : "descending") : now === "ascending" ? "descending" : "ascending";
        for (const h of heads) h.setAttribute("aria-sort", "none");
        head.setAttribute("aria-sort", next);
        const sign = next === "ascending" ? 1 : -1;
        const sorted = [...body.rows].sort((a, b) => {
          const x = of(a, column), y = of(b, column);
          if (x === null || y === null) return (x === null) - (y === null);
          return sign * compare(x, y);
        });
        body.append(...sorted);
      });
    });
    const box = grid.querySelector(".filter"), only = grid.querySelector(".only"), count = grid.querySelector(".count");
    const fits = (row, word) => {
      const found = /^([^=<>]+)([=<>])(.+)$/.exec(word);
      const column = found ? keys.indexOf(found[1]) : -1;
      if (column < 0) return row.textContent.toLowerCase().includes(word);
      const value = of(row, column), wanted = Number(found[3]);
      if (typeof value !== "number") return found[2] === "=" && String(value).toLowerCase() === found[3];
      if (found[2] === "=") return row.cells[column].textContent === found[3] || value === wanted;
      return found[2] === "<" ? value < wanted : value > wanted;
    };
    const filter = () => {
      const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        row.hidden = !(words.every((w) => fits(row, w)) && (!only || !only.checked || row.classList.contains("front")));
        shown += row.hidden ? 0 : 1;
      }
      count.textContent = `${shown} of ${rows.length} shown`;
    };
    box.addEventListener("input", filter);
    if (only) only.addEventListener("change", filter);
    filter();
  }
  // A link to a row shows the row, whatever the filter hides.
  addEventListener("hashchange", () => {
    const row = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (row && row.tagName === "TR") {
      row.hidden = false;
      row.scrollIntoView({ block: "center" });
    }
  });

  // Timelines: everything with times is placed anew when the view changes.
  const NS = "http://www.w3.org/2000/svg";
  for (const line of document.querySelectorAll(".timeline")) {
    const svg = line.querySelector(".tokens"), said = line.querySelector(".said"), time = svg.querySelector(".time");
    const end = Number(svg.dataset.end), height = Number(svg.getAttribute("height"));
    const tokens = svg.dataset.tokens.split(" ").map(Number);
    const slices = [...svg.querySelectorAll(".s")].map((el) => ({ el, s: Number(el.dataset.s), e: Number(el.dataset.e) }));
    const arrows = [...svg.querySelectorAll(".a")].map((el) => ({ el, s: Number(el.dataset.s), e: Number(el.dataset.e), y: el.dataset.y.split(" ").map(Number) }));
    const marks = [...svg.querySelectorAll(".m")].map((el) => ({ el, s: Number(el.dataset.s), y: (/ ([\d.]+)\)/.exec(el.getAttribute("transform")) || [0, 0])[1] }));
    let from = 0, to = Number(svg.dataset.shown), on = -1;
    const show = (us) => (us >= 1000 ? `${(us / 1000).toFixed(3)} ms` : `${us.toFixed(1)} \u00b5s`);
    const draw = () => {
      const width = svg.clientWidth || 1000, scale = width / (to - from), x = (t) => (t - from) * scale;
      svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      for (const { el, s, e } of slices) {
        const a = Math.max(x(s), -5), b = Math.min(x(e), width + 5);
        el.style.display = b < 0 || a > width ? "none" : "";
        el.setAttribute("x", a);
        el.setAttribute("width", Math.max(0.6, b - a));
      }
      for (const { el, s, y } of marks) {
        el.style.display = x(s) < -9 || x(s) > width + 9 ? "none" : "";
        el.setAttribute("transform", `translate(${x(s)} ${y})`);
      }
      for (const { el, s, e, y } of arrows) {
        const a = x(s), b = x(e), outside = (a < 0 && b < 0) || (a > width && b > width);
        el.style.display = outside ? "none" : "";
        el.setAttribute("d", `M${a} ${y[0]}C${a} ${y[0] - 16},${b} ${y[1] + 16},${b} ${y[1]}m-3 6l3 -6l3 6`);
      }
      time.replaceChildren();
      const raw = (to - from) / Math.max(2, width / 130), power = 10 ** Math.floor(Math.log10(raw));
      const step = [1, 2, 5, 10].map((m) => m * power).find((v) => v >= raw);
      for (let n = Math.ceil(from / step); n * step <= to; n++) {
        const tick = document.createElementNS(NS, "line"), text = document.createElementNS(NS, "text");
        for (const [key, value] of [["x1", x(n * step)], ["x2", x(n * step)], ["y1", 16], ["y2", height]]) tick.setAttribute(key, value);
        text.setAttribute("x", Math.min(x(n * step) + 3, width - 52));
        text.setAttribute("y", 12);
        text.textContent = step >= 1000 ? `${((n * step) / 1000).toFixed(0)} ms` : step >= 100 ? `${((n * step) / 1000).toFixed(1)} ms` : `${((n * step) / 1000).toFixed(3)} ms`;
        time.append(tick, text);
      }
    };
    const view = (a, b) => {
      const length = Math.min(end, Math.max(20, b - a));
      from = Math.min(Math.max(0, a), end - length);
      to = from + length;
      draw();
    };
    const zoom = (factor, at) => view(at - (at - from) * factor, at + (to - at) * factor);
    const middle = () => (from + to) / 2;
    const select = (index) => {
      if (on >= 0) slices[on].el.classList.remove("on");
      on = index;
      const { el, s, e } = slices[on];
      el.classList.add("on");
      if (e < from || s > to) view(s - (to - from) / 2, s + (to - from) / 2);
      said.textContent = `${el.dataset.t}; ${show(e - s)} from ${(s / 1000).toFixed(3)} ms`;
    };
    const step = (by) => {
      const first = slices.findIndex((s) => s.s >= from);
      select(Math.min(slices.length - 1, Math.max(0, on < 0 ? Math.max(0, first) : on + by)));
    };
    const act = {
      in: () => zoom(0.5, middle()), out: () => zoom(2, middle()), all: () => view(0, end),
      left: () => view(from - (to - from) / 4, to - (to - from) / 4), right: () => view(from + (to - from) / 4, to + (to - from) / 4),
      next: () => step(1), previous: () => step(-1),
    };
    tokens.forEach((t, n) => (act[`token${n}`] = () => view(n ? tokens[n - 1] : 0, t)));
    for (const button of line.querySelectorAll("[data-do]")) button.addEventListener("click", () => act[button.dataset.do]());
    const keyboard = { "+": "in", "=": "in", "-": "out", "0": "all", ArrowLeft: "left", ArrowRight: "right", n: "next", p: "previous" };
    svg.addEventListener("keydown", (event) => {
      const name = keyboard[event.key];
      if (!name || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      act[name]();
    });
    const place = (event) => from + ((event.clientX - svg.getBoundingClientRect().left) / svg.clientWidth) * (to - from);
    svg.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      zoom(event.deltaY > 0 ? 1.25 : 0.8, place(event));
    }, { passive: false });
    let held = null;
    svg.addEventListener("pointerdown", (event) => { held = { x: event.clientX, from, to, moved: false, target: event.target }; svg.setPointerCapture(event.pointerId); });
    svg.addEventListener("pointermove", (event) => {
      if (!held) return;
      const by = ((event.clientX - held.x) / svg.clientWidth) * (held.to - held.from);
      held.moved ||= Math.abs(event.clientX - held.x) > 4;
      if (held.moved) view(held.from - by, held.to - by);
    });
    svg.addEventListener("pointerup", () => {
      const index = held && !held.moved ? slices.findIndex((s) => s.el === held.target) : -1;
      if (index >= 0) select(index);
      held = null;
    });
    svg.addEventListener("pointercancel", () => (held = null));
    svg.setAttribute("preserveAspectRatio", "xMinYMin");
    new ResizeObserver(draw).observe(svg);
    draw();
  }
})();
