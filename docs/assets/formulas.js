// Formulas in pages are \( ... \) or \[ ... \] in elements of the class "arithmatex"; KaTeX, kept beside this file, sets them.
// The mark that follows one stays on its line.
document.addEventListener("DOMContentLoaded", () => {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const formula = element.textContent.trim().slice(2, -2);
    katex.render(formula, element, { displayMode: element.tagName === "DIV", throwOnError: true });
    const after = element.nextSibling;
    const mark = after?.data?.match(/^[.,;:?!)]+/)?.[0];
    if (mark) {
      const whole = document.createElement("span");
      whole.className = "formula";
      element.replaceWith(whole);
      whole.append(element, mark);
      after.data = after.data.slice(mark.length);
    }
  }
});
