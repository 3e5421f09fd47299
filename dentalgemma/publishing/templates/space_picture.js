// The field for a picture. `props.value` is what the server gets: the file in base64, and not its name.
function take(file) {
  if (!file) return;
  if (file.size > MAX_PICTURE) { trigger("refuse"); return; }
  const reader = new FileReader();
  reader.onload = () => { props.value = reader.result.slice(reader.result.indexOf(",") + 1); trigger("upload"); };
  reader.readAsDataURL(file);
}
element.addEventListener("change", (event) => {
  if (event.target.files) { take(event.target.files[0]); event.target.value = ""; }
});
element.addEventListener("dragover", (event) => event.preventDefault());
element.addEventListener("drop", (event) => { event.preventDefault(); take(event.dataTransfer.files[0]); });
document.addEventListener("paste", (event) => {
  const file = Array.from(event.clipboardData.files)[0];
  if (file) { event.preventDefault(); take(file); }
});
