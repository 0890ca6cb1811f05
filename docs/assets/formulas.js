// Formulas in pages are \( ... \) or \[ ... \] in elements of the class "arithmatex"; KaTeX, kept beside this file, sets them.
document.addEventListener("DOMContentLoaded", () => {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const formula = element.textContent.trim().slice(2, -2);
    katex.render(formula, element, { displayMode: element.tagName === "DIV", throwOnError: true });
  }
});
