const box = document.getElementById("search");
const count = document.getElementById("found");
const articles = [...document.querySelectorAll("article")];
const texts = articles.map((article) => article.textContent.toLowerCase());
box.addEventListener("input", () => {
  const word = box.value.toLowerCase();
  let found = 0;
  articles.forEach((article, index) => {
    article.hidden = !texts[index].includes(word);
    found += !article.hidden;
  });
  count.textContent = word ? `${found} of ${articles.length}` : "";
});
