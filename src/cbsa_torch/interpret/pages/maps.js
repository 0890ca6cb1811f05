// Draws the attention maps and receptive fields of a `.maps` element from the numbers in its JSON.
"use strict";
(() => {
  const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));

  function draw(canvas, values, rows, columns, colors) {
    canvas.width = columns;
    canvas.height = rows;
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(columns, rows);
    values.forEach((value, i) => {
      pixels.data.set(colors.subarray(3 * value, 3 * value + 3), 4 * i);
      pixels.data[4 * i + 3] = 255;
    });
    context.putImageData(pixels, 0, 0);
  }

  function option(value, text) {
    const element = document.createElement("option");
    element.value = value;
    element.textContent = text;
    return element;
  }

  function tile(image) {
    const figure = document.createElement("figure"), pair = document.createElement("div");
    const picture = document.createElement("img"), canvas = document.createElement("canvas");
    const caption = document.createElement("figcaption");
    figure.className = "tile";
    pair.className = "pair";
    picture.src = image.source;
    picture.alt = image.title;
    caption.textContent = image.title;
    pair.append(picture, canvas);
    figure.append(pair, caption);
    return { figure, canvas, caption: image.title };
  }

  function start(root) {
    const data = JSON.parse(root.querySelector("script").textContent);
    const colors = bytes(data.colors);
    for (const layer of data.layers) {
      layer.maps = bytes(layer.maps);
      layer.fields = layer.fields && bytes(layer.fields);
    }
    const chooser = root.querySelector(".chooser"), { layer: layers, head: heads, over } = chooser.elements;
    const tiles = data.images.map(tile), caption = root.querySelector(".caption");
    const area = root.querySelector(".tiles"), fields = root.querySelector(".fields");
    const about = root.querySelector(".about-fields");
    area.append(...tiles.map((item) => item.figure));
    data.layers.forEach((layer, i) => layers.append(option(i, `${layer.number} (${layer.kind})`)));
    layers.value = data.layers.length - 1;

    function fillHeads() {
      const before = heads.value || "0", layer = data.layers[layers.value];
      heads.replaceChildren(option(0, "mean over heads"));
      for (let head = 1; head <= layer.heads; head++) heads.append(option(head, `head ${head}`));
      heads.value = Number(before) <= layer.heads ? before : "0";
    }

    function show() {
      const layer = data.layers[layers.value], head = Number(heads.value), size = layer.rows * layer.columns;
      const name = heads.selectedOptions[0].textContent;
      tiles.forEach(({ canvas, caption }, image) => {
        const at = (image * (layer.heads + 1) + head) * size;
        draw(canvas, layer.maps.subarray(at, at + size), layer.rows, layer.columns, colors);
        canvas.setAttribute("role", "img");
        canvas.setAttribute("aria-label", `attention map of ${caption}, layer ${layer.number}, ${name}`);
      });
      caption.textContent = `layer ${layer.number} of ${data.layers.at(-1).number}, ${name} (${layer.name})`;
      area.classList.toggle("over", over.checked);
      if (fields) showFields(layer, head, size);
    }

    function showFields(layer, head, size) {
      fields.replaceChildren();
      if (!layer.fields) {
        about.textContent = `Layer ${layer.number} has no representatives.`;
        return;
      }
      const shownHead = Math.min(head, layer.fieldHeads) === head ? head : 0;
      about.textContent =
        `Layer ${layer.number}, ${shownHead ? `head ${shownHead}` : "mean over heads"}: ` +
        `${layer.shown} of ${layer.representatives} representatives.`;
      const picture = document.createElement("img");
      picture.src = data.images[0].source;
      picture.alt = data.images[0].title;
      fields.append(picture);
      for (let i = 0; i < layer.shown; i++) {
        const at = (shownHead * layer.shown + i) * size, canvas = document.createElement("canvas");
        draw(canvas, layer.fields.subarray(at, at + size), layer.rows, layer.columns, colors);
        canvas.title = `representative ${i + 1}`;
        fields.append(canvas);
      }
    }

    layers.addEventListener("change", () => { fillHeads(); show(); });
    heads.addEventListener("change", show);
    over.addEventListener("change", show);
    chooser.addEventListener("submit", (event) => event.preventDefault());
    fillHeads();
    show();
    root.classList.add("live");
    for (const element of root.querySelectorAll("[hidden]")) element.hidden = false;
  }

  document.querySelectorAll(".maps").forEach(start);
})();
