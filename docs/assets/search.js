// Four words or more that are pasted are a message, and sought on the page tagged "error" alone: the field then ends with
// +tags:error, and whoever takes that away searches everywhere. The search takes ^ ~ * : and a leading - for operators, and
// with some of them finds nothing. A message has them by chance, and numbers and words that all messages have: the field
// keeps the others.
const SAYS_NOTHING = /Error$|^(cbsa|from|have|must|than|that|there|they|this|which|with)$/;
document.addEventListener("input", ({ target, inputType }) => {
  if (inputType !== "insertFromPaste" || !target.matches("[data-md-component=search-query]")) return;
  if (target.value.trim().split(/\s+/).length >= 4) {
    const words = target.value.match(/[A-Za-z_][\w.]{2,}\w/g) ?? [];
    target.value = [...words.filter((word) => !SAYS_NOTHING.test(word)), "+tags:error"].join(" ");
  }
  target.dispatchEvent(new Event("keyup"));
});
