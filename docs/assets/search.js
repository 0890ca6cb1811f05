// The search takes ^ ~ * : and a leading - for operators, of which some make it find nothing. A pasted message has them
// by chance, and numbers and short words that say nothing: the field keeps its words alone.
document.addEventListener("input", ({ target, inputType }) => {
  if (inputType !== "insertFromPaste" || !target.matches("[data-md-component=search-query]")) return;
  target.value = (target.value.match(/[A-Za-z_][\w.]*\w{2}/g) ?? []).join(" ");
  target.dispatchEvent(new Event("keyup"));
});
