"use strict";
(() => {
  for (const strip of document.querySelectorAll(".strip[data-slider]")) {
    const shots = [...strip.children], reader = strip.nextElementSibling;
    const slider = reader.querySelector("input"), told = reader.querySelector("output");
    const button = reader.querySelector("button");
    let timer = 0;
    const show = (k) => {
      shots.forEach((shot, i) => { shot.hidden = i !== k; });
      slider.value = k;
      told.textContent = shots[k].dataset.said;
      slider.setAttribute("aria-valuetext", told.textContent);
    };
    const stop = () => { clearInterval(timer); timer = 0; button.textContent = "Play"; };
    const step = () => {
      if (+slider.value >= shots.length - 1) stop();
      else show(+slider.value + 1);
    };
    slider.addEventListener("input", () => { stop(); show(+slider.value); });
    button.addEventListener("click", () => {
      if (timer) return stop();
      if (+slider.value >= shots.length - 1) show(0);
      button.textContent = "Stop";
      timer = setInterval(step, 160);
    });
    strip.classList.add("one");
    reader.hidden = false;
    show(shots.length - 1);
  }
})();
