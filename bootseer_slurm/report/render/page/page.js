"use strict";
// Draws the timeline of all nodes. Nothing is loaded, and no text is ever read as HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const canvas = document.getElementById("canvas"), view = document.getElementById("view");
  const spacer = document.getElementById("spacer"), hover = document.getElementById("hover");
  const sort = document.getElementById("sort"), find = document.getElementById("find");
  const AXIS = 26, RIGHT = 12, MOST = 1020, NAMED = 9;
  let shown = [], rowHeight = 0, labels = 90, from = 0, until = data.end, drag = null, waiting = false;

  const colors = () => {
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue("--" + name).trim();
    return { stages: data.stages.map(of), text: of("text"), dim: of("dim"), line: of("line"), row: of("row"),
             after: of("after"), bad: of("bad"), card: of("card") };
  };
  const seconds = (s) => s < 1 ? Math.round(s * 1000) + " ms" : s < 60 ? s.toFixed(s < 10 ? 2 : 1) + " s" :
    s < 3600 ? Math.floor(s / 60) + " min " + String(Math.floor(s % 60)).padStart(2, "0") + " s" :
    Math.floor(s / 3600) + " h " + String(Math.floor(s % 3600 / 60)).padStart(2, "0") + " min";
  const tick = (s, step) => s === 0 ? "0" : s < 60 || step < 1 ? +s.toFixed(2) + " s" :
    s < 3600 ? Math.floor(s / 60) + ":" + String(Math.round(s % 60)).padStart(2, "0") + " min" : (s / 3600).toFixed(1) + " h";
  const last = (node) => node.spans.length ? node.spans[node.spans.length - 1][2] : 0;
  const inStage = (node, stage) => node.spans.reduce((sum, span) => sum + (span[0] === stage ? span[2] - span[1] : 0), 0);

  function choose() {
    const text = find.value.trim().toLowerCase(), by = sort.value;
    shown = data.nodes.filter((node) => !text || node.name.toLowerCase().includes(text));
    if (by === "name") shown.sort((a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }));
    else if (by === "slowest") shown.sort((a, b) => last(b) - last(a));
    else shown.sort((a, b) => inStage(b, +by) - inStage(a, +by));
    document.getElementById("count").textContent = shown.length + " of " + data.nodes.length + " nodes";
    view.scrollTop = 0;
    fit();
  }

  function fit(factor) {
    const least = Math.max(1, Math.min(24, Math.floor(MOST / Math.max(1, shown.length))));
    rowHeight = factor ? Math.max(1, Math.min(28, Math.round(rowHeight * factor))) : least;
    plan();
  }

  function plan() {
    if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; draw(); }); }
  }

  const x = (s) => labels + (s - from) / (until - from) * (canvas.clientWidth - labels - RIGHT);
  const at = (px) => from + (px - labels) / (canvas.clientWidth - labels - RIGHT) * (until - from);

  function draw() {
    const color = colors(), ratio = devicePixelRatio || 1, width = view.clientWidth;
    const height = Math.min(rowHeight * shown.length + AXIS, 1046);
    canvas.style.height = height + "px";
    spacer.style.height = Math.max(0, rowHeight * shown.length + AXIS - height) + "px";
    canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.font = "12px system-ui, sans-serif";
    labels = Math.min(190, 16 + Math.max(60, ...data.longest.map((name) => pen.measureText(name).width)));
    const first = Math.floor(view.scrollTop / rowHeight);
    const count = Math.ceil((height - AXIS) / rowHeight) + 1, shift = view.scrollTop % rowHeight;
    pen.save();
    pen.beginPath(); pen.rect(0, AXIS, width, height - AXIS); pen.clip();
    shown.slice(first, first + count).forEach((node, index) => drawNode(pen, color, node, AXIS - shift + index * rowHeight, width));
    drawNames(pen, color, first, count, shift);
    pen.restore();
    drawAxis(pen, color, width, height);
    document.body.dataset.drawn = "yes";
  }

  function drawNode(pen, color, node, y, width) {
    const thick = rowHeight > 6 ? rowHeight - 2 : rowHeight;
    for (const [stage, begin, end] of node.spans) {
      const left = Math.max(labels, x(begin)), right = Math.min(width - RIGHT, x(end));
      if (right <= left) continue;
      pen.fillStyle = color.stages[stage];
      pen.fillRect(left, y, Math.max(0.6, right - left), thick);
    }
    if (!node.trained && node.spans.length) {  // what came after its last stamp is not known
      const left = Math.max(labels, x(last(node)));
      pen.fillStyle = color.after;
      pen.fillRect(left, y, Math.max(0, Math.min(width - RIGHT, x(data.end)) - left), thick);
    }
    if (!node.spans.length) {
      pen.fillStyle = color.row;
      pen.fillRect(labels, y, width - RIGHT - labels, thick);
    }
  }

  function drawNames(pen, color, first, count, shift) {
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    const all = rowHeight >= NAMED, apart = all ? 1 : Math.ceil(20 / rowHeight);
    if (all) pen.font = Math.min(12, rowHeight + 1) + "px system-ui, sans-serif";
    let free = AXIS;
    shown.slice(first, first + count).forEach((node, index) => {
      const middle = Math.max(AXIS - shift + (index + 0.5) * rowHeight, all ? 0 : AXIS + 7);
      // Of rows that are too low for a name each, those of slow nodes have theirs, and some others.
      if (!all && (middle - 7 < free || !node.cause && (first + index) % apart)) return;
      pen.fillStyle = node.cause ? color.bad : color.dim;
      pen.fillText(clip(pen, node.name, labels - 12), labels - 8, middle);
      free = middle + 7;
    });
  }

  function clip(pen, text, width) {
    let cut = text;
    while (cut.length > 4 && pen.measureText(cut).width > width) cut = cut.slice(0, -2);
    return cut === text ? text : cut + "…";
  }

  function drawAxis(pen, color, width, height) {
    const steps = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1200, 3600, 7200, 21600, 86400];
    const step = steps.find((each) => (until - from) / each < 12) || 86400;
    pen.fillStyle = color.card; pen.fillRect(0, 0, width, AXIS);
    pen.textAlign = "center"; pen.textBaseline = "middle";
    for (let s = Math.ceil(from / step) * step; s <= until; s += step) {
      const px = Math.round(x(s)) + 0.5;
      pen.globalAlpha = 0.5;
      pen.strokeStyle = color.line; pen.beginPath(); pen.moveTo(px, AXIS); pen.lineTo(px, height); pen.stroke();
      pen.globalAlpha = 1;
      pen.fillStyle = color.dim; pen.fillText(tick(s, step), Math.min(px, width - 24), 12);
    }
    if (data.median > from && data.median < until) {
      const px = Math.round(x(data.median)) + 0.5;
      pen.strokeStyle = color.text; pen.setLineDash([4, 3]);
      pen.beginPath(); pen.moveTo(px, AXIS - 4); pen.lineTo(px, height); pen.stroke(); pen.setLineDash([]);
    }
    if (drag && Math.abs(drag.to - drag.from) > 3) {
      pen.globalAlpha = 0.2; pen.fillStyle = color.text;
      pen.fillRect(Math.min(drag.from, drag.to), AXIS, Math.abs(drag.to - drag.from), height - AXIS); pen.globalAlpha = 1;
    }
  }

  const make = (name, text, parent) => {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text;
    if (parent) parent.append(element);
    return element;
  };

  function tell(node, event) {
    hover.replaceChildren();
    make("b", node.name, hover);
    make("div", node.trained ? "trained " + seconds(last(node)) + " after the allocation" :
      node.spans.length ? "when it began training is not known" : "sent no events", hover).className = "dim";
    const table = make("tbody", undefined, make("table", undefined, hover));
    data.stages.forEach((stage, index) => {
      if (!node.spans.some((span) => span[0] === index)) return;
      const row = make("tr", undefined, table), name = make("td", undefined, row);
      make("span", undefined, name).className = "key " + stage;
      name.append(stage + (node.spans.some((span) => span[0] === index && span[3]) ? " ~" : ""));
      make("td", seconds(inStage(node, index)), row).className = "n";
    });
    for (const line of node.facts) make("div", line, hover);
    if (node.cause) make("div", node.cause, hover).className = "slow";
    hover.style.display = "block";
    const box = hover.getBoundingClientRect();
    hover.style.left = Math.max(4, Math.min(event.clientX + 16, innerWidth - box.width - 8)) + "px";
    hover.style.top = Math.max(4, Math.min(event.clientY + 14, innerHeight - box.height - 8)) + "px";
  }

  canvas.addEventListener("mousemove", (event) => {
    if (drag) { drag.to = Math.max(labels, event.offsetX); plan(); return; }
    const row = Math.floor((event.offsetY - AXIS + view.scrollTop) / rowHeight), node = shown[row];
    if (event.offsetY >= AXIS && node) tell(node, event); else hover.style.display = "none";
  });
  canvas.addEventListener("mouseleave", () => { hover.style.display = "none"; });
  canvas.addEventListener("mousedown", (event) => {
    if (event.offsetX > labels) { drag = { from: event.offsetX, to: event.offsetX }; hover.style.display = "none"; }
  });
  addEventListener("mouseup", () => {
    if (!drag) return;
    const [left, right] = [drag.from, drag.to].sort((a, b) => a - b).map(at);
    drag = null;
    if (right - left > (until - from) / 200) { from = Math.max(0, left); until = Math.min(data.end, right); }
    plan();
  });
  const reset = () => { from = 0; until = data.end; fit(); };
  canvas.addEventListener("dblclick", reset);
  document.getElementById("all").addEventListener("click", reset);
  document.getElementById("taller").addEventListener("click", () => fit(rowHeight < 4 ? 2 : 1.5));
  document.getElementById("lower").addEventListener("click", () => fit(1 / 1.5));
  sort.addEventListener("change", choose);
  find.addEventListener("input", choose);
  view.addEventListener("scroll", plan);
  addEventListener("resize", plan);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", plan);
  choose();
})();
