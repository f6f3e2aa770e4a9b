"""Uses the library in this process: no server, no Ray. The picture is drawn here."""

from PIL import Image, ImageDraw

from llava_serve import LLM, SamplingParams

picture = Image.new("RGB", (336, 336), "white")
ImageDraw.Draw(picture).ellipse((90, 90, 250, 250), fill="blue")

llm = LLM("builtin")  # or a folder with a LLaVA checkpoint
greedy = SamplingParams(temperature=0, max_new_tokens=32)

# One query, as the original's command line takes it.
print(llm.generate("What colour is the circle?", images=[picture], sampling=greedy).text)

# A list in, a list out: the engine answers them in one batch.
questions = ["How many shapes are there?", "Is there a star?"]
for question, answer in zip(questions, llm.generate(questions, images=[[picture]] * 2, sampling=greedy), strict=True):
    print(question, answer.text)
