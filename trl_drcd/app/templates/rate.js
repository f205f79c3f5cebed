// Tells the server that a clip was played: after 3 seconds of it, or nearly all where it is shorter.
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
      delete audio.dataset.sent;  // the connection was lost: playing it once more tells it again
      mark.textContent = "not saved; play again";
    }
  };
  for (const type of ["timeupdate", "ended"]) document.addEventListener(type, note, true);
})();
