// The samples. `props.value` is the number of the one that was chosen.
element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) { props.value = Number(button.dataset.number); trigger("choose"); }
});
