"use strict";
(() => {
  const plot = document.querySelector(".plot"), reader = document.querySelector(".reader");
  if (plot && reader) {
    const steps = JSON.parse(plot.dataset.steps), limit = +plot.dataset.limit, end = +plot.dataset.end;
    const over = +plot.dataset.over, slider = reader.querySelector("input"), told = reader.querySelector("output");
    const cursor = plot.querySelector(".cursor"), dot = cursor.querySelector("i");
    const pc = (v) => (100 * v).toFixed(1);
    const size = (v) => (v === 0 ? "0" : over ? (v * over).toPrecision(3) + "/" + over : String(+v.toPrecision(3)));
    const show = (eps) => {
      let low = 0, high = steps.length - 1;
      while (low < high) { const mid = (low + high + 1) >> 1; if (steps[mid][0] <= eps) low = mid; else high = mid - 1; }
      const [, share, from, to] = steps[low];
      cursor.hidden = false;
      cursor.style.left = 100 * eps / limit + "%";
      dot.style.top = 100 * (1 - share) + "%";
      told.textContent = `at ${size(eps)}: ${pc(share)} % (${pc(from)} to ${pc(to)} %)`;
      slider.setAttribute("aria-valuetext", told.textContent);
    };
    const follow = (e) => {
      const frame = plot.getBoundingClientRect();
      const eps = Math.min(end, Math.max(0, (e.clientX - frame.left) / frame.width * limit));
      slider.value = Math.round(1000 * eps / end);
      show(eps);
    };
    plot.addEventListener("pointermove", follow);
    plot.addEventListener("pointerdown", follow);
    slider.addEventListener("input", () => show(slider.value / 1000 * end));
    reader.hidden = false;
    show(end);
    cursor.hidden = true;
  }
  for (const button of document.querySelectorAll("button[data-copy]")) {
    const target = document.getElementById(button.dataset.copy);
    button.hidden = false;
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(target.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(target);
        button.textContent = "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1600);
    });
  }
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const d of closed) d.open = true;
  });
  addEventListener("afterprint", () => { for (const d of closed) d.open = false; });
})();
