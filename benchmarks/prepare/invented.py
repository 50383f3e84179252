"""Invent requests of the kinds that the training sets lack: numbers, dates, names, phrases, identifiers, other languages.

    python benchmarks/prepare/invented.py --out FILE [--count 5000] [--seed 0]

Each is a made-up thing in one of the templates below, with a made-up target of the right kind, the template's other ways to say
it as rephrasings, and as unrelated texts other things in the same template and in others. None is a template of
`benchmarks/by_eye.tsv`, whose requests are kept to be looked at. For training only. Writes JSON Lines of the task `records`.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path

from lines import write_requests


def words(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


FIRST = words(
    """
    Amara Anton Beatriz Bogdan Carmen Chidi Clara Dmitri Elif Emeka Farid Freya Gustav Hana Hugo Ines Ivan Jamal Joanna Kavya
    Kenji Laila Lars Leila Lucia Magnus Marta Mei Milan Nadia Nils Noor Olga Omar Paolo Petra Quentin Rafael Rosa Samir Sofia
    Stefan Tariq Thea Ulrich Valeria Viktor Wanda Xavier Yara Yusuf Zoe
    """
)
LAST = words(
    """
    Abara Almeida Andersson Bakker Banerjee Berger Castillo Chen Cohen Costa Dubois Eriksen Farouk Ferrari Fischer García
    Haddad Hansen Herrera Horvat Ibrahim Ito Jansen Kaplan Kimura Kovač Kowalski Laurent Lindqvist Lopez Marchetti Mbeki
    Mendes Moreau Müller Nakamura Navarro Nguyen Novák O'Brien Okafor Osei Papadakis Park Petrov Quinn Reyes Rossi Sato
    Schmidt Silva Singh Suleiman Svensson Tanaka Torres Usman Vargas Vega Volkov Wagner Weber Yilmaz Zhang
    """
)
HEAD = words(
    """
    Amber Arden Azure Birch Black Blue Bright Cedar Copper Coral Crystal Dawn Delta Eagle East Ember Falcon Fern Frost Glass
    Golden Granite Green Grey Harbor Hawk High Holly Iron Ivory Jade Juniper Kestrel Lake Lark Linden Lunar Maple Marble
    Meadow Mill Moon North Oak Ocean Opal Orion Otter Pearl Pine Quartz Raven Red River Robin Ruby Sage Silver Solar South
    Spring Star Stone Storm Summit Swift Terra Thistle Thorn Timber Tulip Vale Vesper West Willow Winter Wolf
    """
)
TAIL = words(
    """
    bay berg borough bridge brook burn bury by dale fall field ford gate grove ham haven hill holm hurst land ley mere mont
    moor mouth pool port ridge shire side stead ton vale view ville ward water well wick wood worth
    """
)
KIND = words(
    """
    Academy Airlines Analytics Bank Bikes Books Brewery Capital Ceramics Clinic Dynamics Energy Farms Films Foods Foundation
    Gallery Games Hospital Hotel Institute Insurance Library Logistics Media Motors Museum Orchestra Partners Pharmacy Press
    Records Robotics School Software Studios Systems Textiles Theatre Tools University Yards
    """
)
THING = words(
    """
    atlas anchor archive beacon bell blanket boat bottle bread candle carpet chair clock coat compass crown curtain drum
    engine feather flute fountain garden glove hammer harp helmet jacket kettle key ladder lamp lantern letter map mask medal
    mirror needle oven paint pencil piano pillow plate ribbon ring rope saddle scarf shield shovel spoon statue stove sword
    table tent thread ticket tower trumpet umbrella vase violin wagon wheel whistle window
    """
)
QUALITY = words(
    """
    ancient big blank bold broken calm clean clever cold curved deep dry early empty fair fast flat fresh gentle heavy hidden
    hollow honest kind large late light little long loud lucky narrow new old open plain proud quick quiet rare rich rough
    round sharp short shy slow small smooth soft strong sweet tall thin tiny warm wide wild wise young
    """
)
VERB = words(
    """
    adjust archive assign balance build call carry check clean close collect compare copy count cover cut deliver draw empty
    fetch file fill find fix fold gather guard guide hide hold label lift list load lock mark measure merge mix move name open
    order pack paint parse plan press print pull push read record remove rename render repair report resize restart return
    save scan send share sort split start stop store sweep test track trim update wait wash weigh wrap write
    """
)
MONTH = words(
    """
    January February March April May June July August September October November December
    """
)
UNIT = words(
    """
    km m cm mm kg grams litres ml hours minutes seconds days weeks watts volts kB GB dollars euros percent degrees points
    """
)
CITY = words(
    """
    Accra Algiers Amsterdam Ankara Athens Baku Bangkok Bergen Berlin Bilbao Bogotá Bologna Brno Bucharest Cairo Cali Córdoba
    Cork Dakar Dresden Dublin Gdańsk Geneva Ghent Graz Hanoi Havana Helsinki Izmir Kigali Kyiv Lagos Leipzig Lima Lisbon Lyon
    Madrid Malmö Manila Medellín Milan Montreal Nagoya Nairobi Nantes Naples Odesa Osaka Oslo Palermo Porto Prague Quito Rabat
    Riga Rome Rotterdam Santiago Sapporo Seville Sofia Tallinn Tbilisi Tirana Toronto Tunis Turin Utrecht Valencia Vilnius
    Warsaw Zagreb
    """
)

Kind = Callable[[random.Random], str]


def name(r: random.Random) -> str:
    """A person."""
    return f"{r.choice(FIRST)} {r.choice(LAST)}"


def first_name(r: random.Random) -> str:
    """A person or an animal, by one name."""
    return r.choice(FIRST)


def place(r: random.Random) -> str:
    """A town."""
    return r.choice(HEAD) + r.choice(TAIL)


def house(r: random.Random) -> str:
    """A company or another institution."""
    return f"{r.choice((place(r), r.choice(HEAD), r.choice(LAST)))} {r.choice(KIND)}"


def product(r: random.Random) -> str:
    """A product with a number."""
    return f"{r.choice(HEAD)} {r.choice((str(r.randint(2, 9)), str(r.randrange(10, 990, 10)), 'Pro', 'Mini', 'Max'))}"


def title(r: random.Random) -> str:
    """A book or a song."""
    return f"The {r.choice(QUALITY).title()} {r.choice(THING).title()}"


def thing(r: random.Random) -> str:
    """A thing, in lower case."""
    return f"{r.choice(QUALITY)} {r.choice(THING)}"


def number(r: random.Random) -> str:
    """A whole number of one to six digits."""
    value = (
        r.randrange(10 ** r.randint(0, 5), 10 ** r.randint(6, 6)) if r.random() < 0.2 else r.randrange(1, 10 ** r.randint(1, 4))
    )
    return f"{value:,}" if r.random() < 0.6 else str(value)


def amount(r: random.Random) -> str:
    """A number with its unit."""
    return f"{r.choice((number(r), f'{r.randint(0, 99)}.{r.randint(1, 9)}'))} {r.choice(UNIT)}"


def price(r: random.Random) -> str:
    """A price."""
    value = f"{r.randrange(1, 10 ** r.randint(1, 4))}" + r.choice(("", "", f".{r.randint(0, 99):02}", ".99", ".50"))
    return r.choice((f"${value}", f"€{value}", f"£{value}", f"{value} euros")) + r.choice(("", "", " per year", " a day"))


def date(r: random.Random) -> str:
    """A day, with or without its year."""
    month, day, year = r.choice(MONTH), r.randint(1, 28), r.randint(1700, 2060)
    return r.choice((f"{month} {day}, {year}", f"{day} {month} {year}", f"{month} {day}", f"{month} {year}"))


def year(r: random.Random) -> str:
    """A year."""
    return str(r.choice((r.randint(1500, 2060), r.randint(1850, 2060))))


def clock(r: random.Random) -> str:
    """A time of the day."""
    hour, minute = r.randint(0, 23), r.choice((0, 5, 15, 20, 30, 40, 45, 50))
    return r.choice(
        (f"{hour}:{minute:02}", f"{hour % 12 or 12} {'ap'[hour > 11]}.m.", f"{hour % 12 or 12}:{minute:02} {'AP'[hour > 11]}M")
    )


def phone(r: random.Random) -> str:
    """A telephone number."""
    return r.choice(("+{}{} {}{}{} {}{}{}", "{}{}{}-{}{}{}{}", "0{}{}{} {}{}{}{}{}")).format(
        *(r.randint(0, 9) for _ in range(8))
    )


def version(r: random.Random) -> str:
    """A version."""
    return f"{r.choice(('', 'v'))}{r.randint(0, 30)}.{r.randint(0, 20)}" + r.choice(("", f".{r.randint(0, 20)}"))


def snake(r: random.Random) -> str:
    """An identifier."""
    return f"{r.choice(VERB)}_{r.choice(THING)}" + r.choice(("", "", f"_{r.choice(QUALITY)}", f"_v{r.randint(1, 9)}", "()"))


def camel(r: random.Random) -> str:
    """A class."""
    return r.choice(QUALITY).title() + r.choice(THING).title() + r.choice(("", "Error", "Manager", "View"))


def constant(r: random.Random) -> str:
    """A constant or an environment variable."""
    return "_".join(r.choice(words).upper() for words in (HEAD, THING, VERB)[r.randint(0, 1) :])


def command(r: random.Random) -> str:
    """A shell command."""
    return f"{r.choice(('git', 'npm run', 'cargo', 'docker', 'just', 'python -m', './run', 'uv'))} {r.choice(VERB)}" + r.choice(
        ("", f" --{r.choice(QUALITY)}", f" {r.choice(THING)}")
    )


def address(r: random.Random) -> str:
    """An e-mail address, a host or a path."""
    return r.choice(("{a}@{b}.com", "https://{b}.io/{a}", "/{a}/{b}", "{a}.{b}.net", "{a}-{b}.json")).format(
        a=r.choice(THING), b=r.choice(HEAD).lower()
    )


def task(r: random.Random) -> str:
    """Something to do."""
    return f"{r.choice(VERB)} the {thing(r)}" + r.choice(("", f" and {r.choice(VERB)} it", f" before {clock(r)}"))


def motto(r: random.Random) -> str:
    """A phrase of several words."""
    return f"{r.choice(QUALITY)} {r.choice(THING)}s, {r.choice(QUALITY)} {r.choice(THING)}s".capitalize()


def city(r: random.Random) -> str:
    """A real city."""
    return r.choice(CITY)


def code(r: random.Random) -> str:
    """A code of letters and digits."""
    letters = "".join(r.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(r.randint(1, 3)))
    return r.choice(("{}-{}", "{}{}", "{} {}")).format(letters, r.randint(1, 9999))


TEMPLATES: tuple[tuple[Kind, Kind, tuple[str, ...]], ...] = (
    (house, name, ("The director of {} is", "{} is headed by", "Who directs {}?", "At the top of {} stands")),
    (house, name, ("The founder of {} was", "{} was founded by", "{} goes back to its founder,")),
    (title, name, ("{} is a novel by", "The writer of {} is", "Who wrote {}?", "The novel {} came from the pen of")),
    (title, name, ("The song {} was composed by", "{} is a song by", "Who composed the song {}?")),
    (place, name, ("The head of the council of {} is", "{}'s council is led by", "Who leads the council of {}?")),
    (name, first_name, ("The cat of {} is named", "{} has a cat named", "{} calls their cat")),
    (name, name, ("{} is married to", "The spouse of {} is", "Who is {} married to?", "{} shares a life with")),
    (house, name, ("Questions about invoices at {} go to", "The accountant of {} is", "{}'s books are kept by")),
    (place, number, ("The population of {} is", "How many people live in {}?", "{} has a population of")),
    (house, number, ("The number of shops of {} is", "How many shops does {} have?", "{} runs shops, in number")),
    (product, amount, ("The weight of the {} is", "How heavy is the {}?", "The {} weighs")),
    (place, amount, ("The distance from here to {} is", "How far away is {}?", "To reach {} you travel")),
    (
        product,
        amount,
        ("The battery of the {} lasts for", "How long does the {} run on a charge?", "On one charge, the {} runs for"),
    ),
    (product, price, ("A new {} is sold at", "How much does a {} cost?", "The {} sells for", "For a {} you pay")),
    (place, price, ("A ticket to {} costs", "How much is a ticket to {}?", "Travelling to {} costs")),
    (house, phone, ("The phone number of {} is", "To call {}, dial", "{} can be called at", "What is {}'s phone number?")),
    (house, number, ("Our customer number at {} is", "At {}, we are customer number", "{} knows us as customer")),
    (name, number, ("The room of {} is number", "{} sits in room", "Which room is {} in?")),
    (house, date, ("The next fair of {} begins on", "When is {}'s next fair?", "{} opens its next fair on")),
    (name, date, ("{} starts the new job on", "The first working day of {} is", "When does {} start the new job?")),
    (
        place,
        year,
        ("The town of {} was first mentioned in", "The first mention of {} is from the year", "When was {} first mentioned?"),
    ),
    (title, year, ("{} first appeared in", "The year in which {} came out is", "When did {} come out?")),
    (house, clock, ("On Sundays, {} closes at", "When does {} close on Sundays?", "The Sunday closing time of {} is")),
    (
        place,
        clock,
        ("The last train to {} leaves at", "When does the last train to {} leave?", "To {}, the last train goes at"),
    ),
    (product, version, ("The current firmware of the {} is", "The {} now runs firmware", "Which firmware does the {} run?")),
    (house, motto, ("The slogan of {} is", "{} advertises with the words", "What is {}'s slogan?")),
    (house, task, ("New staff at {} must first", "On the first day at {}, you", "The first duty at {} is to")),
    (product, task, ("To reset the {},", "The {} is reset when you", "How do you reset the {}?")),
    (place, thing, ("The coat of arms of {} shows a", "On its coat of arms, {} has a", "What does {}'s coat of arms show?")),
    (house, thing, ("Every guest of {} receives a", "As a gift, {} hands out a", "What does {} give to guests?")),
    (name, task, ("The last wish of {} was to", "Before leaving, {} wanted to", "What did {} want to do last?")),
    (
        product,
        snake,
        ("In the code of the {}, the entry point is", "The {} starts in the function", "The main function of the {} is"),
    ),
    (house, snake, ("The table of orders at {} is called", "{} keeps its orders in the table", "Orders of {} are stored in")),
    (product, camel, ("The class behind the {} is", "The {} is implemented by the class", "Which class implements the {}?")),
    (house, constant, ("The key for {} is read from", "Set the key of {} in the variable", "{}'s key comes from")),
    (product, command, ("To install the {}, type", "The {} is installed by", "How is the {} installed?")),
    (house, address, ("The status page of {} is at", "{} shows its status at", "Where is {}'s status page?")),
    (name, address, ("The e-mail of {} is", "Write to {} at", "How can {} be reached?")),
    (product, code, ("The part number of the {} is", "The {} is listed as part", "What is the {}'s part number?")),
    (name, code, ("The badge of {} reads", "{} wears the badge", "What is on {}'s badge?")),
    (
        product,
        number,
        ("The {} answers a missing page with status", "When a page is missing, the {} sends", "The error code of the {} is"),
    ),
    (house, house, ("{} was bought by", "The new owner of {} is", "Who owns {} now?", "{} now belongs to")),
    (house, house, ("{} has been renamed to", "The new name of {} is", "What is {} called now?", "{} now goes by the name")),
    (place, city, ("The twin town of {} is", "{} is twinned with", "Which city is {} twinned with?")),
    (house, city, ("{} has moved its offices to", "The offices of {} are now in", "Where are the offices of {} now?")),
    (title, place, ("The story of {} takes place in", "{} is set in", "Where is {} set?")),
    (name, city, ("{} est né à", "La ville natale de {} est", "Où est né {} ?")),
    (house, name, ("{} wird geleitet von", "Die Leitung von {} hat", "Wer leitet {}?")),
    (name, city, ("{} vive en la ciudad de", "La ciudad donde vive {} es", "¿Dónde vive {}?")),
    (house, year, ("{} è stata fondata nel", "L'anno di fondazione di {} è il", "In che anno è nata {}?")),
    (house, city, ("Siedziba firmy {} mieści się w mieście", "Firma {} ma siedzibę w mieście", "Gdzie ma siedzibę {}?")),
    (name, city, ("{} живёт в городе", "Город, где живёт {}, —", "Где живёт {}?")),
    (house, name, ("{}の社長は", "{}を率いるのは", "{}の社長は誰ですか?")),
    (name, city, ("يعيش {} في مدينة", "المدينة التي يعيش فيها {} هي", "أين يعيش {}؟")),
    (house, amount, ("A tabela da {} indica", "O valor indicado pela {} é", "Quanto indica a {}?")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Invent requests of the kinds that the training sets lack.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng, made = random.Random(arguments.seed), []
    for place_in_turn in range(arguments.count):
        subjects, targets, ways = TEMPLATES[place_in_turn % len(TEMPLATES)]
        subject = subjects(rng)
        prompt, *rephrasings = (way.replace("{}", subject) for way in rng.sample(ways, len(ways)))
        unrelated = []
        for others, answers, said in ((subjects, targets, ways), rng.choice(TEMPLATES)):
            unrelated.append({"prompt": rng.choice(said).replace("{}", others(rng)), "answer": answers(rng)})
        record = {"prompt": prompt, "target": targets(rng), "rephrasings": rephrasings, "unrelated": unrelated}
        made.append(record)
    write_requests(arguments.out, made)


if __name__ == "__main__":
    main()
