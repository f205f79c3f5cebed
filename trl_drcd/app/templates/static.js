// The filters; without scripts they are hidden and all samples are shown.
(() => {
  const form = document.querySelector(".drcd-filters"), words = document.getElementById("words");
  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());
  const filter = () => {
    const wanted = words.value.trim().toLowerCase();
    const chosen = new Set([...form.querySelectorAll("input:checked")].map((box) => box.value));
    for (const prompt of document.querySelectorAll(".drcd-prompt")) {
      prompt.hidden = !prompt.querySelector("h3").textContent.toLowerCase().includes(wanted);
      for (const item of prompt.querySelectorAll("article")) item.hidden = !chosen.has(item.dataset.strategy);
    }
  };
  form.addEventListener("input", filter);
  // Play one clip at a time
  document.addEventListener("play", (event) => {
    for (const audio of document.querySelectorAll("audio")) if (audio !== event.target) audio.pause();
  }, true);
})();
