"use strict";
// `qlibero open`: asks whether the ledgers have grown, puts the new page in the old one's place, and keeps what the
// reader has opened, chosen and scrolled to. A video that plays is left alone until it stops.
(() => {
  const EVERY_MS = 1000;
  let state = JSON.parse(document.getElementById("data").textContent).state;
  const line = document.body.appendChild(document.createElement("p"));
  line.id = "live";
  line.setAttribute("role", "status");
  const say = (text) => { if (line.textContent !== text) line.textContent = text; };
  const opened = () => [...document.querySelectorAll("details[open] > summary")].map((s) => s.textContent);
  const playing = () => [...document.querySelectorAll("video")].some((v) => !v.paused);

  const replace = (text) => {
    const fresh = new DOMParser().parseFromString(text, "text/html");
    const open = new Set(opened()), chosen = document.querySelector("#episode")?.selectedOptions[0]?.dataset;
    const focus = document.activeElement?.id, top = scrollY;
    for (const id of ["page", "data"]) document.getElementById(id).replaceWith(fresh.getElementById(id));
    document.title = fresh.title;
    state = JSON.parse(document.getElementById("data").textContent).state;
    for (const summary of document.querySelectorAll("summary")) summary.parentElement.open = open.has(summary.textContent);
    const select = document.querySelector("#episode");
    const same = chosen && select && [...select.options].find((o) => o.dataset.key === chosen.key && o.dataset.arm === chosen.arm);
    if (same) same.selected = true;
    start();
    if (focus) document.getElementById(focus)?.focus({ preventScroll: true });
    scrollTo({ top, behavior: "instant" });
  };

  const follow = async () => {
    try {
      const now = await (await fetch("/state", { cache: "no-store" })).text();
      if (now !== state && !playing()) {
        const answer = await fetch("/", { cache: "no-store" });
        if (answer.ok) replace(await answer.text());
      }
      say("live");
    } catch {
      say("qlibero open has ended; this is what it showed last");
    }
    setTimeout(follow, EVERY_MS);
  };
  follow();
})();
