// Reports to the server that a clip was played: after 3 seconds, or 90 % of a shorter clip.
(() => {
  const heard = (audio) => { let sum = 0; for (let i = 0; i < audio.played.length; i++) sum += audio.played.end(i) - audio.played.start(i); return sum; };
  const note = async (event) => {
    const audio = event.target;
    if (!audio.dataset || !audio.dataset.playedUrl || audio.dataset.sent) return;
    if (event.type !== "ended" && heard(audio) < Math.min(3, 0.9 * (audio.duration || Infinity))) return;
    audio.dataset.sent = "1";
    const clip = audio.parentElement, mark = clip.querySelector(".drcd-mark");
    try {
      const answer = await fetch(audio.dataset.playedUrl, { method: "POST" });
      if (!answer.ok) throw new Error(answer.status);
      clip.classList.add("drcd-played");
      mark.textContent = "played";
    } catch (error) {
      delete audio.dataset.sent;  // the connection failed: playing it again reports again
      mark.textContent = "not saved; play again";
    }
  };
  for (const type of ["timeupdate", "ended"]) document.addEventListener(type, note, true);
})();
// Gradio puts each radio button in its own group: make each question one named group with arrow-key navigation.
(() => {
  const questions = "fieldset[id^=rate-]";
  const name = () => {
    for (const group of document.querySelectorAll(questions + ":not([role])")) {
      const label = group.querySelector("[data-testid=block-info]");
      if (!label) continue;
      group.setAttribute("role", "radiogroup");
      group.setAttribute("aria-label", label.textContent.trim());
    }
  };
  new MutationObserver(name).observe(document, { childList: true, subtree: true });
  document.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const group = event.target.closest && event.target.closest(questions);
    if (!step || !group || event.target.type !== "radio") return;
    const all = [...group.querySelectorAll("input[type=radio]")];
    const next = all[(all.indexOf(event.target) + step + all.length) % all.length];
    event.preventDefault();
    next.focus();
    next.click();
  });
})();
