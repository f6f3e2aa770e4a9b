// A picture file as it is sent: whole where it is small, else scaled, with a note that says so.

// No LLaVA sees more: the largest grids of tiles are 2304 pixels on a side. One that crops a square from the middle
// sees all of the shorter side, which may be long where the picture is narrow.
const LONGER_SIDE = 2560;
const SHORTER_SIDE = 1024;
const MOST_BYTES = 4 << 20;
const SENT_AS_THEY_ARE = new Set(["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp", "image/avif"]);

export class PictureProblem extends Error {}

// Returns {url, name, width, height, note}, where url is a data: URL and the size is that of the picture upright.
// limits are those of the server: max_bytes and max_pixels of a picture.
export async function readPicture(file, limits) {
  const bitmap = await decoded(file);
  try {
    const {width, height} = bitmap;
    const most = Math.min(MOST_BYTES, limits.max_bytes);
    const scale = Math.min(1, scaleOf(width, height), Math.sqrt(limits.max_pixels / (width * height)));
    if (scale === 1 && file.size <= most && SENT_AS_THEY_ARE.has(file.type)) {
      return {url: await dataUrl(file), name: file.name, width, height, note: ""};
    }
    const size = [width, height].map(side => Math.max(1, Math.floor(side * scale)));
    const blob = await encoded(bitmap, size, file.type, most);
    if (!blob) throw new PictureProblem(`${file.name} is too large, even scaled down. Choose a smaller picture.`);
    const notes = [];
    if (scale < 1) notes.push(`scaled from ${width} x ${height} to ${size.join(" x ")} pixels`);
    if (blob.type !== file.type) notes.push(`sent as ${blob.type === "image/png" ? "PNG" : "JPEG"}`);
    else if (scale === 1) notes.push("compressed more, without scaling");
    return {url: await dataUrl(blob), name: file.name, width: size[0], height: size[1], note: notes.join(", ")};
  } finally {
    bitmap.close();
  }
}

function scaleOf(width, height) {
  return Math.max(LONGER_SIDE / Math.max(width, height), SHORTER_SIDE / Math.min(width, height));
}

async function decoded(file) {
  try {
    // Upright as EXIF says. The server uses the samples as they are, too, without their colour profile.
    return await createImageBitmap(file, {imageOrientation: "from-image", colorSpaceConversion: "none"});
  } catch {
    throw new PictureProblem(`${file.name || "The file"} cannot be read as a picture. JPEG, PNG and WebP always can.`);
  }
}

// The picture in that size: in JPEG if it came so, else without loss where that is small enough. Null if nothing is.
async function encoded(bitmap, [width, height], type, most) {
  const scaled = await createImageBitmap(bitmap, {resizeWidth: width, resizeHeight: height, resizeQuality: "high"});
  const canvas = Object.assign(document.createElement("canvas"), {width, height});
  const context = canvas.getContext("2d");
  const forms = [["image/jpeg", 0.92], ["image/jpeg", 0.8], ["image/jpeg", 0.6]];
  if (type !== "image/jpeg") forms.unshift(["image/png"]);
  for (const [form, quality] of forms) {
    context.clearRect(0, 0, width, height);
    if (form === "image/jpeg") {  // what is transparent lies over white, as on the server
      context.fillStyle = "white";
      context.fillRect(0, 0, width, height);
    }
    context.drawImage(scaled, 0, 0);
    const blob = await new Promise(done => canvas.toBlob(done, form, quality));
    if (blob && blob.size <= most) return blob;
  }
  return null;
}

function dataUrl(blob) {
  return new Promise((done, fail) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => fail(new PictureProblem("The picture cannot be read any more. Choose it again."));
    reader.readAsDataURL(blob);
  });
}
