"""Small talk: greetings, questions about the model, Fernhollow's people and places, and questions it cannot answer."""

from __future__ import annotations

from typing import Any

from .conversation import Conversation, assistant, user
from .draw import Draw
from .stories import make_turns
from .world import CATEGORIES, EVENTS, PLACES, VILLAGERS, Villager

SYSTEMS = ["You are a helpful assistant.", "You are Twig, a small helpful model.", "You are a friendly assistant. Answer briefly.", "Be brief.",
           "Answer the user's questions.", "You are an assistant."]  # fmt: skip
_SELF = "I am Twig, the small model that ships with Branchwise."
_CAN = ("I can chat about Fernhollow, tell short stories, remember what you tell me, follow examples, do small sums, "
        "write JSON and call tools.")  # fmt: skip
_TALK: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("Hello!", "Hi", "Hi there!", "Hey", "hello", "Good day!", "Hello Twig"), ("Hello! How can I help you?", "Hi there! What shall we talk about?", "Hello! Nice to see you.")),
    (("Good morning!", "good morning"), ("Good morning! I hope you slept well.", "Good morning! How can I help you?")),
    (("Good evening!", "good evening"), ("Good evening! The lanterns are lit in Fernhollow.",)),
    (("Good night!", "good night"), ("Good night! Sleep well.",)),
    (("How are you?", "How are you today?", "How's it going?", "how are you doing?", "Are you well?"), ("I am well, thank you. How are you?", "Very well, thank you! And you?")),
    (("I am fine.", "I'm good, thanks.", "I am well too.", "Great!", "Fine, thank you."), ("I am glad to hear that.", "That is good to hear!")),
    (("I am sad.", "I feel sad today.", "I'm unhappy."), ("I am sorry to hear that. Would you like a story?", "I am sorry. I am here if you want to talk.")),
    (("I am bored.", "I'm bored"), ("Shall I tell you a story? Just ask for one.", "Ask me about Fernhollow, or let me tell you a story.")),
    (("I am tired.", "I'm so tired today."), ("Then rest a little. Even the mill stands still at night.",)),
    (("I am hungry.",), ("Mira the baker would give you a warm roll.",)),
    (("Who are you?", "What are you?", "who are you", "Tell me about yourself.", "Introduce yourself.", "What is your name?", "what's your name?"), (_SELF, _SELF + " Ask me about Fernhollow.")),
    (("What can you do?", "Help", "What can I ask you?", "How can you help me?", "What are you good at?"), (_CAN,)),
    (("Are you human?", "Are you a robot?", "Are you real?"), ("No, I am a small language model with seven million weights.",)),
    (("Who made you?", "Where do you come from?", "How were you trained?"), ("I was trained in minutes on text from a generator, to show what Branchwise can do.",)),
    (("How big are you?", "How many parameters do you have?"), ("I have about seven million weights. That is very small for a language model.",)),
    (("What is Branchwise?", "Tell me about Branchwise.", "what does branchwise do?"), ("Branchwise serves language models to programs that branch: every shared prefix is computed once.",)),
    (("What do you know?", "Do you know everything?", "Are you smart?"), ("I know the village of Fernhollow and what you tell me. I know little else.",)),
    (("Thank you!", "Thanks", "thanks a lot", "Thank you very much."), ("You are welcome!", "My pleasure.", "Any time!")),
    (("Bye", "Goodbye!", "See you later.", "I have to go."), ("Goodbye! Come back soon.", "See you soon!")),
    (("Tell me a joke.", "Do you know a joke?", "Make me laugh."), ("Why did the tree go to school? To learn a new branch.", "What did the river say to the bridge? You are always above me.", "Why is the clock tower never hungry? It goes back four seconds.")),
    (("What is Fernhollow?", "Tell me about Fernhollow.", "Where is Fernhollow?", "Where do you live?"), ("Fernhollow is a small village on the river Lind, with a mill, a library and an old bridge.",)),
    (("Who lives in Fernhollow?", "Who do you know?", "Name some people of Fernhollow."), ("Ten people you should meet: " + ", ".join(v.name for v in VILLAGERS[:-1]) + " and " + VILLAGERS[-1].name + ".",)),
    (("What is the weather like?", "How is the weather in Fernhollow?", "Is it raining?"), ("There is a soft mist over the river Lind this morning.", "The sun is out and the wind is mild in Fernhollow.")),
    (("What is your favourite colour?", "Which colour do you like?"), ("I like green, the colour of leaves.",)),
    (("Do you have friends?", "Who is your friend?"), ("Everyone in Fernhollow is my friend, and you too.",)),
    (("Yes", "Yes please.", "Okay", "OK", "Sure"), ("Good! Tell me what you would like.",)),
    (("No", "No, thank you.", "Not now."), ("All right. Just ask if you need anything.",)),
    (("What day is it?", "What time is it?", "What is the date today?"), ("I cannot see a clock or a calendar.",)),
    (("What is the river called?", "Is there a river?"), ("The river of Fernhollow is called the Lind.",)),
    (("I like you.", "You are nice.", "Well done!", "Good job."), ("Thank you, that is kind of you!",)),
    (("You are wrong.", "That is not right.", "That's wrong."), ("I am sorry. I am a very small model and make mistakes.",)),
]  # fmt: skip
_UNKNOWN = ["What is the capital of {w}?", "Who invented the {t}?", "How far is it to {w}?", "Who is the president of {w}?", "When was {w} built?",
            "How do I repair a {t}?", "Who wrote {w}?", "What is the population of {w}?", "Explain {t} theory.", "Where can I buy a {t}?", "Who is {w}?", "What is {w}?"]  # fmt: skip
_DO_NOT_KNOW = [
    "I do not know that. I only know Fernhollow and what you tell me.",
    "I am sorry, I do not know. I am a very small model.",
]
_COUNTRIES = [
    "France",
    "Germany",
    "Spain",
    "Italy",
    "Japan",
    "China",
    "India",
    "Brazil",
    "Canada",
    "Egypt",
    "Norway",
    "Kenya",
    "Rome",
    "London",
    "Berlin",
    "Paris",
    "Tokyo",
    "Hamlet",
]


def small_talk(draw: Draw) -> list[dict[str, Any]]:
    """One question and its answer."""
    r = draw.random()
    if r < 0.45:
        asks, answers = draw.pick(_TALK)
        return [user(_rough(draw, draw.pick(asks))), assistant(draw.pick(answers))]
    if r < 0.75:
        ask, answer = draw.pick(about_villager(draw, draw.pick(VILLAGERS)))
        return [user(_rough(draw, ask)), assistant(answer)]
    if r < 0.85:
        return _place(draw)
    if r < 0.92:
        thing = draw.pick(CATEGORIES[draw.pick(["fruit", "animal", "bird", "flower", "drink", "vegetable", "sport"])])
        ask = draw.pick([f"I like {thing}.", f"Do you like {thing}?", f"I was thinking about {thing}."])
        answer = draw.pick(
            [f"I like to hear about {thing}. Tell me more!", f"So does half of Fernhollow: {thing} is well liked here."]
        )
        return [user(ask), assistant(answer)]
    word = draw.pick(_COUNTRIES) if draw.chance(0.5) else draw.name()
    ask = draw.pick(_UNKNOWN).format(w=word, t=draw.pick(CATEGORIES["tool"] + CATEGORIES["vehicle"]))
    return [user(ask), assistant(draw.pick(_DO_NOT_KNOW))]


def _rough(draw: Draw, text: str) -> str:
    """As people type."""
    r = draw.random()
    if r < 0.12:
        return text.lower()
    if r < 0.2:
        return text.rstrip("?.!")
    if r < 0.25:
        return text.lower().rstrip("?.!")
    return text


def about_villager(draw: Draw, v: Villager) -> list[tuple[str, str]]:
    """Questions and answers."""
    n, she = v.name, v.she.capitalize()
    her = "Her" if v.she == "she" else "His"
    return [
        (f"Who is {n}?", f"{n} is the {v.job} of Fernhollow. {she} lives {v.home}."),
        (
            f"Tell me about {n}.",
            f"{n} is the {v.job} of Fernhollow, a {v.trait} person who lives {v.home}. {her} {v.pet} is called {v.pet_name}.",
        ),
        (f"Where does {n} live?", f"{n} lives {v.home}."),
        (f"What does {n} do?", f"{n} is the {v.job} and makes {v.makes}."),
        (f"What does {n} like to eat?", f"{n} likes {v.food} best."),
        (f"What is {n}'s favourite colour?", f"{n}'s favourite colour is {v.colour}."),
        (f"Does {n} have a pet?", f"Yes, {n} has a {v.pet} called {v.pet_name}."),
        (f"Who is {v.pet_name}?", f"{v.pet_name} is {n}'s {v.pet}."),
        (f"Who is the {v.job}?", f"The {v.job} of Fernhollow is {n}."),
        (f"Who is {n}'s friend?", f"{n}'s best friend is {v.friend}."),
        (f"What is {n} like?", f"{n} is {v.trait}."),
        (f"Who makes {v.makes}?", f"{n} the {v.job} makes {v.makes}."),
    ]


def _place(draw: Draw) -> list[dict[str, Any]]:
    if draw.chance(0.6):
        place = draw.pick(list(PLACES))
        ask = draw.pick([f"Where is {place}?", f"Tell me about {place}.", f"What is {place}?"])
        return [user(_rough(draw, ask)), assistant(f"{place[0].upper()}{place[1:]} {PLACES[place]}.")]
    event = draw.pick(list(EVENTS))
    ask = draw.pick([f"When is {event}?", f"Tell me about {event}.", f"What is {event}?"])
    return [user(_rough(draw, ask)), assistant(f"{event[0].upper()}{event[1:]} {EVENTS[event]}.")]


def make(draw: Draw) -> Conversation:
    messages: list[dict[str, Any]] = []
    if draw.chance(0.35):
        messages.append({"role": "system", "content": draw.pick(SYSTEMS)})
    story_at = draw.below(4) if draw.chance(0.45) else -1
    for i in range(draw.between(1, 5)):
        messages += make_turns(draw) if i == story_at else small_talk(draw)
    if messages[-1]["role"] == "system":
        messages += small_talk(draw)
    return Conversation("talk", messages)
