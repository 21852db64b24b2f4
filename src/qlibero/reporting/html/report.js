"use strict";
// Comfort only: everything on the page can be read without this script.
function start() {
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const data = JSON.parse($("#data").textContent);
  if (!data.flips) return;  // nothing has run yet

  // light or dark: what the system says, until the button is pressed
  $("#theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  // the section in view, marked in the navigation
  const links = new Map($$("nav a").map((a) => [a.hash.slice(1), a]));
  start.watcher?.disconnect();
  const watcher = start.watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const [id, a] of links) {
        a.classList.toggle("here", id === entry.target.id);
        if (id === entry.target.id) a.setAttribute("aria-current", "true"); else a.removeAttribute("aria-current");
      }
    }
  }, { rootMargin: "-20% 0px -70% 0px" });
  $$("main section").forEach((section) => watcher.observe(section));

  // tables that sort by a click on their heading: numbers by value, then words, and what is missing last either way
  const order = (cell) => {
    const text = cell.textContent.trim(), said = $("[data-value]", cell)?.dataset.value;
    const number = said ?? text.replace(/−/g, "-").match(/^\[?([+-]?\d[\d,]*(\.\d+)?(e[+-]?\d+)?)(?![.\w])/)?.[1].replace(/,/g, "");
    return { text, number: Number(number), rank: number !== undefined ? 0 : ["", "–"].includes(text) ? 2 : 1 };
  };
  for (const table of $$("table.sortable")) {
    $$("thead th", table).forEach((th, i) => $("button", th).addEventListener("click", () => {
      const up = th.getAttribute("aria-sort") !== "ascending";
      $$("thead th", table).forEach((other) => other.removeAttribute("aria-sort"));
      th.setAttribute("aria-sort", up ? "ascending" : "descending");
      const body = $("tbody", table);
      const rows = [...body.rows].map((row) => ({ row, ...order(row.children[i]) })).sort((a, b) => {
        const within = a.rank ? a.text.localeCompare(b.text, undefined, { numeric: true }) : a.number - b.number;
        return a.rank - b.rank || (up ? within : -within);
      });
      body.append(...rows.map((each) => each.row));
    }));
  }

  for (const button of $$("[data-copy]")) {
    button.addEventListener("click", async () => {
      const pre = document.getElementById(button.dataset.copy);
      try {
        await navigator.clipboard.writeText(pre.textContent);
        button.textContent = "Copied";
      } catch {  // a page from disk may not use the clipboard: select it for the reader
        getSelection().selectAllChildren(pre);
        button.textContent = "Selected, press Ctrl+C";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 2500);
    });
  }

  // the flips map: pointer, arrow keys, and Enter for the video of a cell
  const words = { s: "both succeed", f: "both fail", b: "broken: the reference succeeds, this arm fails", r: "repaired: the reference fails, this arm succeeds", e: "error", u: "unpaired", "·": "not run" };
  const player = setUpPlayer();
  for (const map of $$(".heatmap")) {
    const { cell, rows } = data.flips.arms[map.dataset.arm], { tasks, keys, columns, line } = data.flips.cells[cell];
    // a task's row is folded into lines: (x, y) is an episode, (across, down) where it is drawn
    const folds = Math.ceil(columns.length / line);
    let x = 0, y = 0;
    const go = (across, down) => {
      const inside = (value, count) => Math.min(count - 1, Math.max(0, value));
      down = inside(down, rows.length * folds);
      y = Math.floor(down / folds);
      x = inside(down % folds * line + inside(across, line), columns.length);
      show();
    };
    const keyOf = () => [...keys[y], ...columns[x]].join("/");
    const show = () => {
      const cursor = $(".cursor", map);
      cursor.setAttribute("x", 10 * (x % line));
      cursor.setAttribute("y", 10 * (y * folds + Math.floor(x / line)));
      const hint = player && player.has(map.dataset.arm, keyOf()) ? " Click or press Enter for the video." : "";
      $("#flip-readout").textContent = `${data.labels[map.dataset.arm]}, ${tasks[y]}, initial state ${columns[x][0]}${folds > 1 ? `, seed ${columns[x][1]}` : ""}: ${words[rows[y][x]]}.${hint}`;
    };
    const play = () => { if (player) player.choose(map.dataset.arm, keyOf()); };
    const point = (event) => {
      const box = map.getBoundingClientRect();
      go(Math.floor(line * (event.clientX - box.left) / box.width), Math.floor(rows.length * folds * (event.clientY - box.top) / box.height));
    };
    map.addEventListener("pointermove", point);
    map.addEventListener("click", (event) => { point(event); play(); });
    map.addEventListener("focus", show);
    map.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (event.key === "Enter") return play();
      if (!move) return;
      event.preventDefault();
      go(x % line + move[0], y * folds + Math.floor(x / line) + move[1]);
    });
  }

  // two videos, one clock: the longer one leads, the other holds its last frame
  function setUpPlayer() {
    const select = $("#episode");
    if (!select) return null;
    const HZ = 20, left = $("#video-left"), right = $("#video-right"), scrub = $("#scrub"), play = $("#play");
    let playing = false, clock = 0, before = 0, divergence = null;
    const length = () => Math.max(left.duration || 0, right.duration || 0);
    const seek = (seconds) => {
      clock = Math.min(Math.max(seconds, 0), length());
      for (const video of [left, right]) if (video.duration) video.currentTime = Math.min(clock, Math.max(video.duration - 0.03, 0));
      draw();
    };
    const draw = () => {
      scrub.value = length() ? String(Math.round(1000 * clock / length())) : "0";
      $("#step").textContent = `step ${Math.round(clock * HZ)}`;
    };
    const pause = () => { playing = false; left.pause(); right.pause(); play.textContent = "Play"; };
    const begin = () => {
      if (clock >= length() - 0.05) seek(0);
      playing = true;
      before = performance.now();
      play.textContent = "Pause";
      for (const video of [left, right]) if (clock < video.duration - 0.05) video.play().catch(() => {});
      requestAnimationFrame(tick);
    };
    const tick = (now) => {
      if (!playing) return;
      clock += (now - before) / 1000;
      before = now;
      for (const video of [left, right]) {  // a video that lags behind the clock is put right
        if (video.duration && clock < video.duration - 0.1 && Math.abs(video.currentTime - clock) > 0.12) video.currentTime = clock;
      }
      draw();
      if (clock >= length()) { clock = length(); return pause(); }
      requestAnimationFrame(tick);
    };
    const load = () => {
      pause();
      const d = select.selectedOptions[0].dataset;
      left.src = document.getElementById(d.left).value;
      right.src = document.getElementById(d.right).value;
      $("#caption-left").textContent = `${d.leftLabel}: ${d.leftOutcome}`;
      $("#caption-right").textContent = `${d.rightLabel}: ${d.rightOutcome}`;
      $("#told").textContent = d.told ? `“${d.told}”` : "";
      // what a viewer sees first: apart, or doing opposite things; actions beyond noise alone are invisible
      const seen = [d.visible, d.gripper].map(Number).filter((n) => !Number.isNaN(n)), actions = Number(d.actions);
      divergence = seen.length ? Math.min(...seen) : Number.isNaN(actions) ? null : actions;
      const from = (step) => step === "never" ? "never" : `from step ${step}`;
      $("#divergence-text").textContent = d.actions === "unknown" ? "Where they part is unknown: there are no trajectories."
        : `Grippers 1 cm apart: ${from(d.visible)}. One opens, the other closes: ${from(d.gripper)}. Actions differ beyond noise: ${from(d.actions)}.`;
      $("#to-divergence").disabled = divergence === null;
      clock = 0;
      draw();
    };
    select.addEventListener("change", load);
    play.addEventListener("click", () => (playing ? pause() : begin()));
    scrub.addEventListener("input", () => { pause(); seek(length() * scrub.value / 1000); });
    $("#to-divergence").addEventListener("click", () => { pause(); seek(divergence / HZ - 0.5); begin(); });
    load();
    const find = (arm, key) => [...select.options].find((o) => o.dataset.arm === arm && o.dataset.key === key);
    return {
      has: (arm, key) => Boolean(find(arm, key)),
      choose: (arm, key) => {
        const option = find(arm, key);
        if (!option) return;
        select.value = option.value;
        load();
        $("#videos").scrollIntoView();
        play.focus({ preventScroll: true });
      },
    };
  }
}
start();
