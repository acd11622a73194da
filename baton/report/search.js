"use strict";
for (const box of document.querySelectorAll("[data-search]")) {
  const rows = [...document.getElementById(box.dataset.search).tBodies[0].rows];
  const [words, worse] = box.querySelectorAll("input");
  const count = box.querySelector("output");
  const show = () => {
    const wanted = words.value.toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const fits = row.textContent.toLowerCase().includes(wanted) && (!worse.checked || row.className === "worse");
      row.hidden = !fits;
      shown += fits;
    }
    count.textContent = `${shown} of ${rows.length}`;
  };
  box.addEventListener("input", show);
  box.hidden = false;
  show();
}
