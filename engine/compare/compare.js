// The text while it is written; keys 1 to 4 vote; Ctrl-Enter sends.
const writing = document.querySelector("[data-round]");
if (writing) {
  const status = document.getElementById("status");
  const source = new EventSource(`/events?round=${writing.dataset.round}`);
  source.onmessage = (event) => {
    JSON.parse(event.data).texts.forEach((text, place) => {
      document.getElementById(`text-${place}`).textContent = text.trimStart();
    });
  };
  source.addEventListener("done", () => {
    source.close();
    // After a refused form the address is not that of the page.
    location.pathname === "/" ? location.reload() : location.replace("/");
  });
  source.onerror = () => {
    status.textContent = "The connection is lost. Is compare.py still running?";
  };
}

document.addEventListener("keydown", (event) => {
  const isText = event.target.matches("textarea, input");
  if (isText && event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.target.form.requestSubmit();
  } else if (!isText && !event.ctrlKey && !event.metaKey && !event.altKey && !event.repeat) {
    document.querySelector(`button[data-key="${CSS.escape(event.key)}"]`)?.click();
  }
});

// The newest part of a dialogue.
document.querySelector("main[data-chat] article")?.scrollIntoView({ block: "nearest" });
