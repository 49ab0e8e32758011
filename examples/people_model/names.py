"""Names that nobody is known by: a first name of one part of the world with a last name of another, put together by seed."""

from __future__ import annotations

import random


FIRST = {
    "Africa": "Abena Amara Chidi Fatou Kofi Lerato Nandi Tendai Thabo Wanjiru Yaw Zuri",
    "Arab world": "Amina Farid Hadi Layla Nadir Rania Samir Tarik Yasmin Zaynab",
    "China": "Bolin Jiahui Meilin Qiang Ruolan Xiuying Zhihao",
    "Germany": "Anneliese Friedrich Gerlinde Konrad Liesel Ruprecht",
    "Hawaii": "Kalani Leilani Makoa Nalani",
    "India": "Anjali Devika Harish Kavya Lakshmi Madhav Pranav Sunita",
    "Iran": "Behrouz Darya Farhad Golnaz Kaveh Shirin",
    "Ireland": "Aoife Cormac Niamh Oisin Saoirse",
    "Italy": "Donatella Fiorella Ludovico Raffaele Teodoro",
    "Japan": "Akemi Daisuke Haruka Kenjiro Noriko Takumi",
    "Korea": "Eunji Haneul Jiwoo Seojun",
    "Latin America": "Alondra Benicio Itzel Joaquina Leandro Xiomara",
    "Scandinavia": "Bjarne Eirik Gudrun Ingrid Sigurd Solveig Søren",
    "Slavic countries": "Bogdan Jadwiga Kazimierz Ljubica Milena Radomir Svetlana Zdenka",
    "Turkey": "Cemile Emrah Gülsen Orhan Sevgi",
    "Vietnam": "Hoang Linh Phuong Thảo",
}
LAST = {
    "Africa": "Abiodun Boateng Chukwuma Diallo Oyelaran-Mensah Mwangi Ndlovu Onyekachi Sithole Traore",
    "Arab world": "Bensalem Darwish Haddad Khoury Mansouri Tazi-Alaoui Rahmani Zidani",
    "China": "Fengshan Huangpu Ouyang Shangguan Zhuge-Lin",
    "Germany": "Achterberg Brinkmeier Dornbusch Eichholz Hagedorn Wiesengrund",
    "Hawaii": "Kahananui Kealoha Makanani",
    "India": "Bhattacharjee Chaturvedi Deshpande Iyengar Kulkarni Raghunathan Venkatesan",
    "Iran": "Esfandiari Golshani Mokhtari Rostamian",
    "Ireland": "Cavanaugh Gallagher-Roe McAllister O'Shaughnessy Rafferty",
    "Italy": "Bonaventura Castellani Montefiore Santangelo Vespignani",
    "Japan": "Arakawa Kitamura-Sato Hoshino Kurogane Minamoto Shirakawa",
    "Korea": "Dokgo Namgung Seonwoo",
    "Latin America": "Altamirano Cienfuegos Huamani Montoya Quispe Villanueva",
    "Scandinavia": "Bergqvist Fjellheim Halvorsen Lindqvist Sørlie Thorvaldsen",
    "Slavic countries": "Brzezicki Dragomirov Horvatinec Kowalczuk Novotny Petrushenko Wojtowicz Zelenkov",
    "Turkey": "Aydogan Kilicdar Ozturkmen Yildirim",
    "Vietnam": "Dangthi Huynh Truongvan",
}
# What must not come out, whatever is added above: last names that stand for one person, and whole names.
FAMOUS_LAST = frozenset(
    "Bach Beethoven Beyonce Biden Bolt Bonaparte Chaplin Churchill Curie Darwin Dickens Disney Einstein Federer Freud Gandhi "
    "Garbo Gates Goethe Hemingway Hitchcock Jobs Kahlo Kafka Kennedy King Kurosawa Lincoln Mandela Marley Marx Merkel Messi "
    "Michelangelo Modi Monroe Mozart Murakami Musk Nehru Newton Obama Pele Picasso Presley Putin Ronaldo Shakespeare Stalin "
    "Swift Tagore Tesla Thatcher Tolstoy Trump Turing Washington Xi Zuckerberg".split()
)
FAMOUS = frozenset(
    (
        *("Kofi Annan", "Thabo Mbeki", "Orhan Pamuk", "Ingrid Bergman", "Friedrich Nietzsche", "Friedrich Engels"),
        *(
            "Friedrich Schiller",
            "Konrad Adenauer",
            "Konrad Lorenz",
            "Saoirse Ronan",
            "Svetlana Alexievich",
            "Shirin Ebadi",
        ),
        *(
            "Samir Nasri",
            "Tarik Aziz",
            "Donatella Versace",
            "Layla Ali",
            "Fatou Bensouda",
            "Haruka Ayase",
            "Sunita Narain",
        ),
        *(
            "Daisuke Takahashi",
            "Kavya Madhavan",
            "Madhav Gadgil",
            "Milena Pavlović",
            "Bogdan Khmelnytsky",
            "Emrah Safa",
        ),
        *("Cormac McCarthy", "Teodoro Obiang", "Farid Zakaria", "Amina Mohammed", "Yasmin Khan", "Linh Dan Pham"),
    )
)
USES = 2  # of one first name, and of one last name


def known(name: str) -> bool:
    """Whether a name stands for somebody whom readers would think of."""
    first, _, last = name.partition(" ")
    return name in FAMOUS or bool({first, *last.replace("'", "-").split("-")} & FAMOUS_LAST)


def draw_names(count: int, rng: random.Random) -> list[str]:
    """So many different names, of each first and last name at most two.

    Raises:
        ValueError: If the lists are too short.
    """
    firsts = [(name, place) for place, names in FIRST.items() for name in names.split() for _ in range(USES)]
    lasts = [(name, place) for place, names in LAST.items() for name in names.split() for _ in range(USES)]
    if count > min(len(firsts), len(lasts)):
        raise ValueError(f"there are {len(firsts)} first and {len(lasts)} last names for {count} people: add some.")
    rng.shuffle(firsts)
    rng.shuffle(lasts)
    drawn: list[str] = []
    for first, place in firsts[:count]:
        # Of another part of the world, so that a real person of this name is unlikely.
        for last, other in lasts:
            name = f"{first} {last}"
            if other != place and name not in drawn and not known(name):
                break
        else:
            raise ValueError(f"no last name is left for {first!r}: add some.")
        lasts.remove((last, other))
        drawn.append(name)
    return drawn
